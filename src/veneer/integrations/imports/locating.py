"""The file to import, found without torch."""

from __future__ import annotations

from pathlib import Path

from ...errors import AdapterFileError
from ...expert_layouts.layouts import LAYOUTS
from ...files.archive import is_archive
from ...files.header import metadata_and_shapes
from ...files.layout import CONFIG_NAME, SAFETENSORS_NAME
from ..export.options import DIFFUSERS_FILE


def in_a_layout(source: Path) -> bool:
    """Whether a source may be an adapter with experts in a layout, or Tinker's archive.

    Raises:
        AdapterFileError: Its file of tensors is damaged.
    """
    if not (source / CONFIG_NAME).is_file():
        return is_archive(source)
    tensors = source / SAFETENSORS_NAME
    shapes = metadata_and_shapes(tensors)[1] if tensors.is_file() else None
    theirs = [".experts.", *(name for row in LAYOUTS.values() for name, _ in row.renames)]
    return shapes is None or any(part in name for name in shapes for part in theirs)


def check_source(source: Path) -> None:
    """Check the file to import by its header.

    Raises:
        AdapterFileError: It is missing or damaged, or there are several.
    """
    metadata_and_shapes(located(source))


def located(source: Path) -> Path:
    """The file of tensors.

    Raises:
        AdapterFileError: There is none, or more than one.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise AdapterFileError(f"there is no file or directory {str(source)!r}")
    if (source / CONFIG_NAME).is_file():
        raise AdapterFileError(f"{source} is in PEFT's format already: it has an {CONFIG_NAME}")
    for name in (DIFFUSERS_FILE, DIFFUSERS_FILE.replace(".safetensors", ".bin")):
        if (source / name).is_file():
            return source / name
    found = sorted(path for path in source.iterdir() if path.suffix == ".safetensors")
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found[:5])
    what = f"several files of tensors ({names}); name one of them" if found else "no file of tensors"
    raise AdapterFileError(f"{source} holds {what}")
