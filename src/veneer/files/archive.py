"""The files of an adapter in a tar archive, such as Tinker's checkpoints. Archives are not trusted."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from veneer.errors import AdapterFileError, show
from veneer.files.layout import CONFIG_NAME, SAFETENSORS_NAME
from veneer.wording import bullets, first_line

#: Entries of an archive that are looked at; an adapter's has a handful.
MAX_ENTRIES = 10_000
_MOST = 10


def is_archive(path: Path) -> bool:
    """Whether a path is that of a tar archive, by its name."""
    return path.suffix == ".tar" and path.is_file()


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The configuration and the tensors of an archive in a directory, which is removed at the end.

    Nothing else is unpacked. The archive is not compressed, so no file can be larger than it.

    Raises:
        AdapterFileError: The archive is damaged or compressed, has links, devices or paths that lead out of
            it, or does not have one configuration with tensors beside it; lists everything.
    """
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / (path.stem or "adapter")
        made.mkdir()
        try:
            with tarfile.open(path, "r:") as archive:
                for member in _members(path, archive):
                    source = archive.extractfile(member)
                    assert source is not None
                    with source, (made / PurePosixPath(member.name).name).open("xb") as target:
                        shutil.copyfileobj(source, target)
        except AdapterFileError:
            raise
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise AdapterFileError(
                f"{path} is damaged, or compressed, which it must not be: {first_line(error)}"
            ) from error
        yield made


def _members(path: Path, archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    files: dict[PurePosixPath, tarfile.TarInfo] = {}
    wrong = []
    for number, member in enumerate(archive):
        if number == MAX_ENTRIES:
            raise AdapterFileError(f"{path} is no adapter: it has more than {MAX_ENTRIES} entries")
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name:
            wrong.append(f"{show(member.name)} leads out of the archive")
        elif member.isdir():
            continue
        elif not member.isreg() or member.issparse() or member.size < 0:
            wrong.append(f"{show(member.name)} is a link, a device or a sparse file")
        elif name in files:
            wrong.append(f"{show(member.name)} is there twice")
        else:
            files[name] = member
    configs = [name for name in files if name.name == CONFIG_NAME]
    wanted = [configs[0], configs[0].with_name(SAFETENSORS_NAME)] if len(configs) == 1 else []
    if not wanted:
        wrong.append(f"it has {len(configs)} files {CONFIG_NAME}, and an adapter has one")
    wrong += [f"it has no {name}" for name in wanted if name not in files]
    if wrong:
        raise AdapterFileError(bullets(f"{path} is no archive of an adapter:", wrong, _MOST))
    return [files[name] for name in wanted]
