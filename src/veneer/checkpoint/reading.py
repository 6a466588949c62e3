"""Reading an adapter's directory. Files are hostile until proven otherwise."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError, VeneerWarning
from .header import Header, name_problem, raw_header, read_header
from .layout import locate_tensors


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
    _header: Header | None = field(default=None, repr=False, compare=False)
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
        return {k: tensor.to(device) for k, tensor in self._mapped(wanted).items()}

    def _mapped(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors that lie in the file itself, which is mapped once for all of them."""
        header = self._header
        assert header is not None
        try:
            if raw_header(self.path) != header.raw:
                raise AdapterFileError(f"{self.path} cannot be read: it was changed since it was opened")
            size = max((end for _, end in header.places.values()), default=0)
            memory = torch.UntypedStorage.from_file(str(self.path), False, size)
        except (RuntimeError, OSError) as exc:
            raise AdapterFileError(f"{self.path} cannot be read: {exc}") from exc
        found = {}
        for key in keys:
            begin, end = header.places[key]
            tensor = torch.empty(0, dtype=self.dtypes[key])
            found[key] = tensor.set_(memory[begin:end]).view(self.shapes[key])
        return found


def open_adapter(directory: str | os.PathLike[str]) -> AdapterFile:
    """Open the tensors of the adapter in a directory; nothing but the header is read.

    A ``.bin`` is a pickle: it is read with ``weights_only=True`` and one notice. Where both formats lie in
    the directory, safetensors is taken.

    Raises:
        AdapterFileError: the file is missing, truncated, damaged, hostile, or no adapter at all; says which.
    """
    return open_tensors(locate_tensors(Path(directory)))


def open_tensors(path: Path) -> AdapterFile:
    """Open a file of tensors of whatever name, as `open_adapter` does that of a directory.

    Raises:
        AdapterFileError: as for `open_adapter`.
    """
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)


def _open_safetensors(path: Path) -> AdapterFile:
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as exc:
        raise AdapterFileError(f"{path} is damaged: {exc}") from exc
    if names != set(header.shapes):
        raise AdapterFileError(f"{path} is damaged: two readings of its header differ")
    dtypes = {name: getattr(torch, dtype) for name, dtype in header.dtypes.items()}
    return AdapterFile(path, header.shapes, dtypes, header.metadata, header)


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
        stacklevel=4,
    )
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    return AdapterFile(path, shapes, {k: t.dtype for k, t in tensors.items()}, {}, None, tensors)


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
