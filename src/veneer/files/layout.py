"""Which files of a directory are the adapter, and which configuration belongs to its tensors.

The metadata of the tensors carry the configuration that they were saved with, and a digest of the
``adapter_config.json`` that the save replaces. A save moves the tensors into place first, the configuration
second. So a reader can tell what lies beside the tensors:

- the configuration that was saved with them;
- the one that was to be replaced, or none: the save was cut short, and that in the metadata is used;
- a different one: it was edited, and is used.

Writers take turns. While the same tensors are in place, no other save touches the configuration beside
them. So a reader opens the tensors, reads the configuration, and begins again if the tensors were replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from veneer.errors import AdapterFileError, ConfigError, short
from veneer.files.config import parse_config, read_config_bytes
from veneer.files.header import read_metadata
from veneer.wording import listed

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
CARD_NAME = "README.md"

#: Keys of the tensors' metadata: the configuration as it was saved, and the digest of the one it replaces.
SAVED_CONFIG = "veneer_config"
REPLACED_CONFIG = "veneer_replaces"

#: How often a reader begins again where the tensors are replaced under its hands.
ATTEMPTS = 100

#: What a save that was killed leaves; the second form is that of earlier versions.
_LEFT_OVER = re.compile(
    r"\.veneer-(?P<id>[0-9a-f]{16})(-(?P<format>safetensors|bin)-(?P<file>config|tensors|card))?\.tmp"
)
_FULL_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_File = TypeVar("_File")


def saved_metadata(root: Path, text: str) -> dict[str, str]:
    """The metadata for tensors that are saved with the configuration `text`."""
    beside, saved = _config_bytes(root), {SAVED_CONFIG: text}
    return saved if beside in (None, text.encode()) else {**saved, REPLACED_CONFIG: _digest(beside or b"")}


class BelongingConfig(NamedTuple):
    """The configuration of tensors.

    Attributes:
        path: The file that holds it, or would.
        values: The configuration.
        cut_short: A sentence if the save of the tensors was cut short.
        saved: The configuration saved with the tensors, if the file was edited since.
    """

    path: Path
    values: dict[str, Any]
    cut_short: str | None = None
    saved: dict[str, Any] | None = None


def belonging_config(root: Path, metadata: Mapping[str, str], beside: bytes | None) -> BelongingConfig:
    """The configuration that belongs to tensors.

    Args:
        root: The directory.
        metadata: That of its tensors.
        beside: The content of its ``adapter_config.json``; None where there is none.

    Raises:
        AdapterFileError: There is no configuration, or it is no JSON object.
    """
    path = root / CONFIG_NAME
    if SAVED_CONFIG not in metadata:
        if older := _older_save(root):
            remark = f"a save into {root} was cut short; its configuration is read from {older[0].name}"
            return BelongingConfig(path, parse_config(read_config_bytes(older[0]), str(older[0])), remark)
        if beside is None:
            raise AdapterFileError(f"no {CONFIG_NAME} in {root}.{_contents(root)}")
        return BelongingConfig(path, parse_config(beside, str(path)))
    raw = metadata[SAVED_CONFIG].encode("utf-8", "surrogatepass")
    if beside == raw:
        return BelongingConfig(path, parse_config(raw, str(path)))
    saved = parse_config(raw, f"the configuration in the metadata of the tensors in {root}")
    if beside is None or _digest(beside) == metadata.get(REPLACED_CONFIG):
        lag = "is missing" if beside is None else "is the one before"
        remark = (
            f"a save into {root} was cut short: its tensors are in place, its {CONFIG_NAME} {lag}. The "
            "configuration that was saved with the tensors is used; save again for other readers"
        )
        return BelongingConfig(path, saved, remark)
    return BelongingConfig(path, parse_config(beside, str(path)), saved=saved)


@contextlib.contextmanager
def blame_file(adapter: str | os.PathLike[str]) -> Iterator[None]:
    """Raise errors in an adapter's configuration as errors of that file, not of the caller's options."""
    try:
        yield
    except ConfigError as error:
        raise AdapterFileError(f"the {CONFIG_NAME} of {adapter} cannot be used: {error}") from error


def together(root: Path, read: Callable[[Path], _File]) -> tuple[_File, bytes | None]:
    """The tensors of a directory as `read` gives them, and what its ``adapter_config.json`` held beside them.

    If the tensors are replaced meanwhile, both are read again.

    Raises:
        AdapterFileError: There are no tensors, or `read` refuses them; or they are replaced again and again.
    """
    for _ in range(ATTEMPTS):
        path = locate_tensors(root)
        refused = None
        with contextlib.suppress(FileNotFoundError), watched(path) as unchanged:
            try:
                file = read(path)
            except AdapterFileError as error:
                refused = error
            beside = _config_bytes(root)
            if not unchanged():
                continue
            if refused is not None:
                raise refused
            return file, beside
    raise AdapterFileError(f"{root} cannot be read: its tensors are replaced again and again")


@contextlib.contextmanager
def watched(path: Path) -> Iterator[Callable[[], bool]]:
    """Tell whether a path still is the file that it was at the beginning, with the content that it had.

    Raises:
        FileNotFoundError: There is no such file.
    """
    try:
        stream = path.open("rb")  # while it is open, no other file gets its number
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AdapterFileError(f"cannot read {path}: {error.strerror or error}") from error
    with stream:
        before = identity(os.fstat(stream.fileno()))

        def unchanged() -> bool:
            try:
                return identity(path.stat()) == before
            except FileNotFoundError:
                return False

        yield unchanged


def identity(status: os.stat_result) -> tuple[int, ...]:
    """A value that changes when the file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def find_config(root: Path) -> BelongingConfig:
    """The configuration that belongs to the tensors of a directory; without tensors, the one in it.

    Raises:
        AdapterFileError: Missing, too large, or not a JSON object.
    """
    root = check_directory(root)
    metadata, beside = together(root, _metadata) if _tensors(root) else ({}, _config_bytes(root))
    return belonging_config(root, metadata, beside)


def locate_tensors(directory: str | Path) -> Path:
    """The file of tensors: safetensors if there is one, else the pickle.

    Raises:
        AdapterFileError: with what the directory holds instead.
    """
    root = check_directory(directory)
    found = _tensors(root)
    if len(found) > 1 and (older := _older_save(root)) and older[1] == BIN_NAME:
        return root / BIN_NAME
    if found:
        return found[0]
    lacks = (
        f"neither {SAFETENSORS_NAME} nor {BIN_NAME}"
        if (root / CONFIG_NAME).is_file()
        else f"no {CONFIG_NAME}"
    )
    raise AdapterFileError(f"{lacks} in {root}.{_contents(root)}")


def check_directory(directory: str | Path) -> Path:
    """The directory as a path.

    Raises:
        AdapterFileError: it does not exist, or is a file (the message names the directory to pass).
    """
    root = Path(directory)
    if os.path.isdir(root):  # False too for a name that no file can have, where Path.is_dir raises
        return root
    if os.path.exists(root):
        raise AdapterFileError(f"{root} is a file; pass the directory that holds it: {str(root.parent)!r}")
    near = _adapters_in(root.parent) if os.path.isdir(root.parent) else ""
    more = f"; adapters there: {near}" if near else ""
    raise AdapterFileError(f"there is no directory {short(str(root))!r}{more}")


def left_over(root: Path) -> list[Path]:
    """The files that killed saves left in a directory.

    Configurations come before tensors: without its tensors, that of an earlier version would be believed.
    """
    found = [path for path in root.iterdir() if _LEFT_OVER.fullmatch(path.name)]
    return sorted(found, key=lambda path: "-tensors." in path.name)


def finish_older_save(root: Path) -> None:
    """Finish a save by an earlier version that was killed between its moves."""
    if older := _older_save(root):
        if older[1] == BIN_NAME:
            (root / SAFETENSORS_NAME).unlink(missing_ok=True)
        os.replace(older[0], root / CONFIG_NAME)


def _older_save(root: Path) -> tuple[Path, str] | None:
    """Configuration and name of the tensors of an earlier version's save, killed after it moved these."""
    found = {path.name: parts for path in root.iterdir() if (parts := _LEFT_OVER.fullmatch(path.name))}
    for name, parts in found.items():
        if parts["file"] != "config" or name.replace("-config.", "-tensors.") in found:
            continue
        tensors = BIN_NAME if parts["format"] == "bin" else SAFETENSORS_NAME
        # Tensors that say which configuration is theirs were saved since.
        if (root / tensors).is_file() and SAVED_CONFIG not in _metadata(root / tensors):
            return root / name, tensors
    return None


def _tensors(root: Path) -> list[Path]:
    return [root / name for name in (SAFETENSORS_NAME, BIN_NAME) if (root / name).is_file()]


def _metadata(path: Path) -> dict[str, str]:
    try:
        return read_metadata(path)
    except AdapterFileError:  # whoever reads the tensors says what is wrong with them
        return {}


def _config_bytes(root: Path) -> bytes | None:
    """The content of ``adapter_config.json``; None where there is none."""
    try:
        return read_config_bytes(root / CONFIG_NAME)
    except AdapterFileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _adapters_in(root: Path) -> str:
    """The subdirectories with an adapter, as a list in words; empty if there are none."""
    inside = [
        path.name
        for path in sorted(root.iterdir(), key=lambda p: p.name)
        if path.is_dir() and any((path / n).is_file() for n in (SAFETENSORS_NAME, BIN_NAME, CONFIG_NAME))
    ]
    return listed(repr(str(root / name)) for name in inside)


def _contents(root: Path) -> str:
    """One or two sentences on the contents of a directory without an adapter."""
    if inside := _adapters_in(root):
        return f" Sub-directories hold one: {inside}; pass one of these."
    entries = sorted(root.iterdir(), key=lambda p: p.name)
    names = [p.name + ("/" if p.is_dir() else "") for p in entries]
    if any(n in _FULL_MODEL for n in names) or any(
        re.fullmatch(r"model-\d+-of-\d+\.safetensors", n) for n in names
    ):
        return " This is a whole model, not an adapter: load it with its own library, such as transformers."
    if not names:
        return " The directory is empty."
    return f" The directory holds {listed(names, 10)}."
