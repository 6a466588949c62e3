"""Which files of a directory are the adapter, and which one wins, also after a save that was killed.

A save writes temporary siblings first, then moves the tensors and the configuration into place. Between
these two moves lies the only moment at which the directory's named files do not belong together. It can be
recognised: the configuration's temporary file is there, complete, and the tensors' is not any more. The
reader then takes the temporary configuration, so that Veneer sees either the old adapter or the new one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_config_file
from ..errors import AdapterFileError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
CARD_NAME = "README.md"

_TEMPORARY = re.compile(
    r"\.veneer-(?P<id>[0-9a-f]{16})-(?P<format>safetensors|bin)-(?P<file>config|tensors|card)\.tmp"
)
_FULL_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def temporary_name(save_id: str, format: str, file: str) -> str:
    """Name of the temporary sibling of one file of one save."""
    return f".veneer-{save_id}-{format}-{file}.tmp"


def tensors_name(format: str) -> str:
    """File name of the tensors in a format, ``"safetensors"`` or ``"bin"``."""
    return SAFETENSORS_NAME if format == "safetensors" else BIN_NAME


def temporaries(directory: Path) -> list[Path]:
    """What saves that did not finish left in the directory."""
    return sorted(p for p in directory.iterdir() if _TEMPORARY.fullmatch(p.name))


@dataclass(frozen=True)
class Unfinished:
    """A save that was killed after its tensors were in place and before its configuration was."""

    config: Path
    format: str


def unfinished_save(directory: Path) -> Unfinished | None:
    """The save to roll forward, if there is one."""
    found = {p.name: p for p in temporaries(directory)}
    for name, path in found.items():
        parts = _TEMPORARY.fullmatch(name)
        if parts is None or parts["file"] != "config":
            continue
        waiting = temporary_name(parts["id"], parts["format"], "tensors")
        if waiting not in found and (directory / tensors_name(parts["format"])).is_file():
            return Unfinished(path, parts["format"])
    return None


def locate_config(directory: str | Path) -> Path:
    """The configuration file that belongs to the directory's tensors.

    Raises:
        AdapterFileError: with what the directory holds instead.
    """
    root = check_directory(directory)
    unfinished = unfinished_save(root)
    path = unfinished.config if unfinished else root / CONFIG_NAME
    if not path.is_file():
        raise AdapterFileError(f"no {CONFIG_NAME} in {root}.{_what_is_there(root)}")
    return path


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of the ``adapter_config.json`` that belongs to the directory's tensors, as it is.

    Raises:
        AdapterFileError: missing, too large, or not a JSON object.
    """
    return read_config_file(locate_config(Path(directory)))


def locate_tensors(directory: str | Path) -> Path:
    """The file of tensors: safetensors when there is one, else the pickled one.

    Raises:
        AdapterFileError: with what the directory holds instead.
    """
    root = check_directory(directory)
    unfinished = unfinished_save(root)
    if unfinished:
        return root / tensors_name(unfinished.format)
    for name in (SAFETENSORS_NAME, BIN_NAME):
        if (root / name).is_file():
            return root / name
    raise AdapterFileError(f"neither {SAFETENSORS_NAME} nor {BIN_NAME} in {root}.{_what_is_there(root)}")


def check_directory(directory: str | Path) -> Path:
    """The directory as a path.

    Raises:
        AdapterFileError: it does not exist, or is a file (the message names the directory to pass).
    """
    root = Path(directory)
    if root.is_dir():
        return root
    if root.exists():
        raise AdapterFileError(f"{root} is a file; pass the directory that holds it: {str(root.parent)!r}")
    raise AdapterFileError(f"there is no directory {str(root)!r}")


def _what_is_there(root: Path) -> str:
    """One or two sentences on what a directory without an adapter does hold."""
    entries = sorted(root.iterdir(), key=lambda p: p.name)
    inside = [
        p.name
        for p in entries
        if p.is_dir() and any((p / n).is_file() for n in (SAFETENSORS_NAME, BIN_NAME, CONFIG_NAME))
    ]
    if inside:
        more = f" (and {len(inside) - 3} more)" if len(inside) > 3 else ""
        paths = ", ".join(repr(str(root / n)) for n in inside[:3])
        return f" Sub-directories hold one: {paths}{more}; pass one of these."
    names = [p.name + ("/" if p.is_dir() else "") for p in entries]
    if any(n in _FULL_MODEL for n in names) or any(
        re.fullmatch(r"model-\d+-of-\d+\.safetensors", n) for n in names
    ):
        return " This is a whole model, not an adapter: load it with its own library, such as transformers."
    if not names:
        return " The directory is empty."
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f" The directory holds {', '.join(names[:10])}{more}."
