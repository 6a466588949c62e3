"""Reading an adapter's directory. Files are hostile until proven otherwise."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ..config import read_config_file
from ..errors import AdapterFileError, VeneerWarning
from .layout import SAFETENSORS_NAME, locate_config, locate_tensors

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
MAX_NAME = 1024

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter on disk, not read yet.

    Attributes:
        path: the file.
        shapes: shape of each tensor, by its name on disk.
        dtypes: dtype of each tensor.
        metadata: the file's own metadata (empty for a ``.bin``).
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    _loaded: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    def tensors(
        self, keys: Iterable[str] | None = None, device: str | torch.device = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Read tensors, memory-mapped where the format allows it.

        Args:
            keys: names on disk; all of them when None.
            device: where to put them.

        Raises:
            AdapterFileError: a name that the file does not hold, or a file that changed since it was opened.
        """
        wanted = list(self.shapes if keys is None else keys)
        unknown = [k for k in wanted if k not in self.shapes]
        if unknown:
            raise AdapterFileError(f"{self.path} holds no tensor {', '.join(map(repr, unknown[:3]))}")
        if self._loaded is not None:
            return {k: self._loaded[k].to(device) for k in wanted}
        try:
            with safe_open(self.path, framework="pt") as file:
                return {k: file.get_tensor(k).to(device) for k in wanted}
        except (SafetensorError, OSError) as exc:
            raise AdapterFileError(f"{self.path} cannot be read: {exc}") from exc


def open_adapter(directory: str | os.PathLike[str]) -> AdapterFile:
    """Open the tensors of the adapter in a directory; nothing but the header is read.

    A ``.bin`` is a pickle: it is read with ``weights_only=True`` and one notice. Where both formats lie in
    the directory, safetensors is taken.

    Raises:
        AdapterFileError: the file is missing, truncated, damaged, hostile, or no adapter at all; says which.
    """
    path = locate_tensors(Path(directory))
    return _open_safetensors(path) if path.name == SAFETENSORS_NAME else _open_bin(path)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of the ``adapter_config.json`` that belongs to the directory's tensors, as it is.

    Raises:
        AdapterFileError: missing, too large, or not a JSON object.
    """
    return read_config_file(locate_config(Path(directory)))


#: (header, bytes after it) -> what was found in it; adapters of one kind have the same.
HeaderMemo = dict[tuple[bytes, int], AdapterFile]


def read_safetensors_header(path: Path, memo: HeaderMemo | None = None) -> AdapterFile:
    """The tensors of a safetensors file by its header alone, checked against the file's size.

    Args:
        path: the file.
        memo: headers that were read before, and understood once; written to.

    Raises:
        AdapterFileError: the file is truncated, damaged or hostile; says which.
    """
    raw = _raw_header(path)
    room = path.stat().st_size - len(raw) - 8
    if memo is None:
        return _understood(path, raw, room)
    if (raw, room) not in memo:
        memo[raw, room] = _understood(path, raw, room)
    return replace(memo[raw, room], path=path)


def _understood(path: Path, raw: bytes, room: int) -> AdapterFile:
    header = _parsed_header(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFileError(f"{path} is damaged: its metadata is not a table of strings")
    shapes, dtypes = _check_entries(path, header, room)
    return AdapterFile(path, shapes, dtypes, cast(dict[str, str], metadata))


def _open_safetensors(path: Path) -> AdapterFile:
    found = read_safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as exc:
        raise AdapterFileError(f"{path} is damaged: {exc}") from exc
    if names != set(found.shapes):
        raise AdapterFileError(f"{path} is damaged: two readings of its header differ")
    return found


def _raw_header(path: Path) -> bytes:
    """The JSON header, which begins after eight bytes that say how long it is."""
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
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise AdapterFileError(f"{path} is damaged: its header is not valid JSON ({exc})") from exc
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path} is damaged: its header is not a table of tensors")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _check_entries(
    path: Path, header: Mapping[str, Any], room: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Check every tensor's name, dtype, shape and place; `room` is the number of bytes after the header."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        problem = name_problem(name) or _entry_problem(entry)
        if problem:
            raise AdapterFileError(f"{path} is damaged: tensor {name[:120]!r}: {problem}")
        begin, end = entry["data_offsets"]
        shapes[name] = tuple(entry["shape"])
        dtypes[name] = _DTYPES[entry["dtype"]]
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
    return shapes, dtypes


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "its entry lacks dtype, shape or data_offsets"
    if entry["dtype"] not in _DTYPES if isinstance(entry["dtype"], str) else True:
        return f"dtype {entry['dtype']!r} is unknown; adapters hold {', '.join(_DTYPES)}"
    for key in ("shape", "data_offsets"):
        values = entry[key]
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
            return f"its {key} are not a list of sizes"
    if len(entry["shape"]) > 16 or len(entry["data_offsets"]) != 2:
        return "its shape or its data_offsets have too many entries"
    begin, end = entry["data_offsets"]
    needed = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
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


def _open_bin(path: Path) -> AdapterFile:
    size = path.stat().st_size
    _check_zip(path, size)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as exc:
        raise AdapterFileError(
            f"{path} is a pickle of more than tensors, and reading it could run foreign code; refused. "
            f"Ask its author for a safetensors file. ({str(exc).splitlines()[0]})"
        ) from exc
    except Exception as exc:  # a damaged archive can fail anywhere in the unpickler
        raise AdapterFileError(
            f"{path} is damaged: {type(exc).__name__}: {str(exc).splitlines()[0]}"
        ) from exc
    tensors = _check_content(path, content, size)
    warnings.warn(
        f"{path} is a pickle; it was read as tensors only. Save the adapter again to get a safetensors file.",
        VeneerWarning,
        stacklevel=3,
    )
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    return AdapterFile(path, shapes, {k: t.dtype for k, t in tensors.items()}, {}, tensors)


def _check_zip(path: Path, size: int) -> None:
    """Refuse what is no plain archive of torch.save; a compressed entry could unfold to any size."""
    if not zipfile.is_zipfile(path):
        raise AdapterFileError(
            f"{path} is truncated, or a pickle from before torch 1.6, of which sizes cannot be checked "
            f"before allocation. If you trust it: torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
        raise AdapterFileError(f"{path} is damaged: {exc}") from exc
    packed = any(e.compress_type != zipfile.ZIP_STORED for e in entries)
    if packed or sum(e.file_size for e in entries) > size:
        raise AdapterFileError(
            f"{path} is not an archive that torch.save writes (compressed or overlapping entries)"
        )


def _check_content(path: Path, content: Any, size: int) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        raise AdapterFileError(f"{path} holds a {type(content).__name__}, not a table of tensors")
    for name, value in content.items():
        problem = name_problem(name)
        if problem is None and not isinstance(value, torch.Tensor):
            problem = f"a {type(value).__name__}, not a tensor"
        elif problem is None and (value.layout is not torch.strided or value.is_quantized or value.is_meta):
            problem = "not a plain dense tensor"
        elif problem is None and value.numel() * value.element_size() > size:
            problem = f"shape {tuple(value.shape)} needs more bytes than the file has"
        if problem:
            raise AdapterFileError(f"{path} is no adapter: {str(name)[:120]!r}: {problem}")
    return {k: t.detach() for k, t in content.items()}
