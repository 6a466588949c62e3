"""The header of a safetensors file: names, shapes and places of its tensors, checked; torch is not needed."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from veneer.errors import AdapterFileError, show
from veneer.files.config import no_duplicates

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
MAX_NAME = 1024

#: Where in the archive of a ``.bin`` Veneer writes its metadata; other readers pass over it.
BIN_METADATA = "veneer_metadata.json"

#: dtypes by their names in a file: their names in torch, and bytes an element.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says about its tensors.

    Attributes:
        shapes: shape of each tensor, by its name on disk.
        dtypes: dtype of each tensor, by torch's name.
        first: first byte after the header.
        places: first byte of each tensor in the file, and the one after its last.
        metadata: the file's own metadata.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    first: int
    places: dict[str, tuple[int, int]]
    metadata: dict[str, str]


#: (header, bytes after it) -> what was found in it; adapters of one kind have the same.
HeaderMemo = dict[tuple[bytes, int], Header]


def read_header(path: Path, memo: HeaderMemo | None = None) -> Header:
    """Read the header of a safetensors file, and check it against the file's size.

    Args:
        path: the file.
        memo: headers that were parsed before; new ones are added.

    Raises:
        AdapterFileError: the file is truncated, damaged or hostile; says which.
    """
    raw = raw_header(path)
    room = path.stat().st_size - len(raw) - 8
    if memo is None:
        return _understood(path, raw, room)
    if (raw, room) not in memo:
        memo[raw, room] = _understood(path, raw, room)
    return memo[raw, room]


def _understood(path: Path, raw: bytes, room: int) -> Header:
    header = _parsed_header(path, raw)
    metadata = _checked_metadata(path, header.pop("__metadata__", {}))
    places = _checked_places(path, header, room)
    first = 8 + len(raw)
    return Header(
        {name: tuple(entry["shape"]) for name, entry in header.items()},
        {name: DTYPES[entry["dtype"]][0] for name, entry in header.items()},
        first,
        {name: (first + begin, first + end) for name, begin, end in places},
        metadata,
    )


def _checked_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFileError(f"{path} is damaged: its metadata is not a table of strings")
    try:
        "".join(text for entry in metadata.items() for text in entry).encode()
    except UnicodeEncodeError as exc:
        raise AdapterFileError(
            f"{path} is damaged: half a hex escape in its metadata ({exc.reason})"
        ) from exc
    return cast(dict[str, str], metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file of tensors of either format; only that part is read.

    Raises:
        AdapterFileError: the file is truncated, damaged or hostile; says which.
    """
    return bin_metadata(path) if path.suffix == ".bin" else read_header(path).metadata


def metadata_and_shapes(
    path: Path, memo: HeaderMemo | None = None
) -> tuple[dict[str, str], dict[str, tuple[int, ...]] | None]:
    """The metadata and the shapes of tensors in a file of either format; none for a pickle.

    Raises:
        AdapterFileError: the file is truncated, damaged or hostile; says which.
    """
    if path.suffix == ".bin":
        check_archive(path, path.stat().st_size)
        return bin_metadata(path), None
    header = read_header(path, memo)
    return header.metadata, header.shapes


def bin_metadata(path: Path) -> dict[str, str]:
    """The metadata in an archive of torch.save; empty if another library wrote it.

    Raises:
        AdapterFileError: the archive or its metadata are damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if e.filename.rpartition("/")[2] == BIN_METADATA]
            if not entries:
                return {}
            if len(entries) > 1 or entries[0].file_size > MAX_HEADER_BYTES:
                raise ValueError("its metadata are too large, or there twice")
            raw = archive.read(entries[0])
        metadata = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except Exception as exc:  # a damaged archive can fail anywhere in zipfile
        raise AdapterFileError(f"{path} is damaged: {type(exc).__name__}: {exc}") from exc
    return _checked_metadata(path, metadata)


def check_archive(path: Path, size: int) -> None:
    """Refuse anything but a plain archive of torch.save; a compressed entry could expand to any size."""
    try:
        entries = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
        raise AdapterFileError(f"{path} is damaged: {exc}") from exc
    if not entries:
        raise AdapterFileError(
            f"{path} is truncated, or a pickle from before torch 1.6, of which sizes cannot be checked "
            f"before allocation. If you trust it: torch.save(torch.load(path, weights_only=True), path)"
        )
    packed = any(e.compress_type != zipfile.ZIP_STORED for e in entries)
    if packed or sum(e.file_size for e in entries) > size:
        raise AdapterFileError(
            f"{path} is not an archive that torch.save writes (compressed or overlapping entries)"
        )


def raw_header(path: Path) -> bytes:
    """The JSON header, which follows eight bytes with its length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise AdapterFileError(f"{path} is truncated: {size} bytes, not even a header")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER_BYTES or length + 8 > size:
            hint = " (a git-lfs pointer: run git lfs pull)" if first == b"version " else ""
            raise AdapterFileError(
                f"{path} is truncated or not a safetensors file{hint}: its first bytes announce a header of "
                f"{length:,} bytes, the file has {size:,}"
            )
        return file.read(length)


def _parsed_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise AdapterFileError(f"{path} is damaged: its header is not valid JSON ({exc})") from exc
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path} is damaged: its header is not a table of tensors")
    return header


def _checked_places(path: Path, header: Mapping[str, Any], room: int) -> list[tuple[str, int, int]]:
    """Name, begin and end of every tensor, its dtype and shape checked; `room` is for all of them."""
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        problem = name_problem(name) or _entry_problem(entry)
        if problem:
            raise AdapterFileError(f"{path} is damaged: tensor {name[:120]!r}: {problem}")
        begin, end = entry["data_offsets"]
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            what = "overlaps the one before it" if begin < at else "leaves a gap before it"
            raise AdapterFileError(
                f"{path} is damaged: tensor {name[:120]!r} {what} (offset {begin}, expected {at})"
            )
        at = end
    if at != room:
        what = "truncated" if at > room else "damaged"
        raise AdapterFileError(f"{path} is {what}: its tensors take {at:,} bytes, the file holds {room:,}")
    return [(name, begin, end) for begin, end, name in places]


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "its entry lacks dtype, shape or data_offsets"
    if entry["dtype"] not in DTYPES if isinstance(entry["dtype"], str) else True:
        return f"dtype {show(entry['dtype'])} is unknown; adapters hold {', '.join(DTYPES)}"
    for key in ("shape", "data_offsets"):
        values = entry[key]
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
            return f"its {key} are not a list of sizes"
    if len(entry["shape"]) > 16 or len(entry["data_offsets"]) != 2:
        return "its shape or its data_offsets have too many entries"
    begin, end = entry["data_offsets"]
    needed = math.prod(entry["shape"]) * DTYPES[entry["dtype"]][1]
    if end - begin != needed:
        return f"shape {entry['shape']} of {entry['dtype']} needs {needed:,} bytes, it has {end - begin:,}"
    return None


def name_problem(name: object) -> str | None:
    """Why `name` cannot name a tensor, or None."""
    if not isinstance(name, str) or not name:
        return "a tensor's name is a non-empty string"
    if len(name) > MAX_NAME:
        return f"its name has {len(name)} characters; the limit is {MAX_NAME}"
    if not name.isprintable():
        return "its name contains a control character"
    return None
