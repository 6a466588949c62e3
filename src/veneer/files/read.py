"""Reading an adapter's directory. Files are not trusted."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from veneer.errors import AdapterFileError
from veneer.files.digest import DATA_DIGEST, data_digest
from veneer.files.header import Header, bin_metadata, check_archive, name_problem, read_header
from veneer.files.layout import BelongingConfig, belonging_config, check_directory, identity, together
from veneer.wording import first_line, warn


@dataclass
class _Mapped:
    """Tensors that lie in a file, which is mapped once for all of them."""

    header: Header
    memory: Any  # torch.UntypedStorage, of which mypy knows no slices
    checked: bool = False

    def check(self, path: Path) -> None:
        """Compare the data with the digest that was saved with them, if there is one.

        Raises:
            AdapterFileError: They differ.
        """
        saved = self.header.metadata.get(DATA_DIGEST)
        if self.checked or saved is None:
            return
        if data_digest(self.memory, self.header.first) != saved:
            raise AdapterFileError(
                f"{path} is damaged: its tensors are not those that were saved (they differ from "
                f"{DATA_DIGEST} in the metadata). Fetch the file again. If a program changed them on "
                f"purpose, let it drop the metadata: save_file(load_file(path), path)"
            )
        self.checked = True

    def __getitem__(self, name: str) -> torch.Tensor:
        begin, end = self.header.places[name]
        tensor = torch.empty(0, dtype=getattr(torch, self.header.dtypes[name]))
        return tensor.set_(self.memory[begin:end]).view(self.header.shapes[name])


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter on disk, not yet read, and their configuration.

    Attributes:
        path: the file.
        shapes: shape of each tensor, by its name on disk.
        dtypes: dtype of each tensor.
        metadata: the file's own metadata (empty for a ``.bin`` of another library).
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    _content: dict[str, torch.Tensor] | _Mapped = field(repr=False, compare=False)
    _identity: tuple[int, ...] = field(repr=False, compare=False)
    _beside: bytes | None = field(default=None, repr=False, compare=False)

    def belonging_config(self) -> BelongingConfig:
        """The configuration that belongs to the tensors, for `PeftConfig.from_belonging`.

        Raises:
            AdapterFileError: There is none, or it is no JSON object.
        """
        return belonging_config(self.path.parent, self.metadata, self._beside)

    def tensors(
        self, keys: Iterable[str] | None = None, device: str | torch.device = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Read tensors, memory-mapped where the format allows it.

        They are those of the file that was opened, even if it has been replaced since.

        Args:
            keys: names on disk; all of them when None.
            device: where to put them.

        Raises:
            AdapterFileError: a name that the file does not hold, a file that was changed in place since
                it was opened, or data that are not those that were saved.
        """
        wanted = list(self.shapes if keys is None else keys)
        unknown = [k for k in wanted if k not in self.shapes]
        if unknown:
            raise AdapterFileError(f"{self.path} holds no tensor {', '.join(map(repr, unknown[:3]))}")
        with contextlib.suppress(FileNotFoundError):
            now = identity(self.path.stat())
            if now[:2] == self._identity[:2] and now != self._identity:
                raise AdapterFileError(f"{self.path} cannot be read: it was changed since it was opened")
        if wanted and isinstance(self._content, _Mapped):
            self._content.check(self.path)
        return {key: self._content[key].to(device) for key in wanted}


def open_adapter(directory: str | os.PathLike[str]) -> AdapterFile:
    """Open the tensors of the adapter in a directory; nothing but the header is read.

    A ``.bin`` is a pickle: it is read with ``weights_only=True`` and one notice. If both formats are in
    the directory, safetensors is used.

    Raises:
        AdapterFileError: the file is missing, truncated, damaged, hostile, or no adapter at all; says which.
    """
    file, beside = together(check_directory(Path(directory)), open_tensors)
    return replace(file, _beside=beside)


def open_tensors(path: Path) -> AdapterFile:
    """Open a file of tensors of any name, as `open_adapter` does that of a directory.

    Raises:
        AdapterFileError: as for `open_adapter`.
    """
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)


def _open_safetensors(path: Path) -> AdapterFile:
    status = path.stat()
    header = read_header(path)
    try:
        memory = torch.UntypedStorage.from_file(str(path), False, status.st_size)
        changed = identity(path.stat()) != identity(status)
    except (RuntimeError, OSError) as exc:
        raise AdapterFileError(f"{path} cannot be mapped into memory: {exc}") from exc
    if changed:
        raise AdapterFileError(f"{path} cannot be read: it was changed while it was opened")
    dtypes = {name: getattr(torch, dtype) for name, dtype in header.dtypes.items()}
    content = _Mapped(header, memory)
    return AdapterFile(path, header.shapes, dtypes, header.metadata, content, identity(status))


def _open_bin(path: Path) -> AdapterFile:
    status = path.stat()
    check_archive(path, status.st_size)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as exc:
        raise AdapterFileError(
            f"{path} is a pickle of more than tensors, and reading it could run foreign code; refused. "
            f"Ask its author for a safetensors file. ({first_line(exc)})"
        ) from exc
    except Exception as exc:  # a damaged archive can fail anywhere in the unpickler
        raise AdapterFileError(f"{path} is damaged: {type(exc).__name__}: {first_line(exc)}") from exc
    tensors = _check_content(path, content, status.st_size)
    warn(
        f"{path} is a pickle; it was read as tensors only. Save the adapter again to get a safetensors file."
    )
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    dtypes = {k: t.dtype for k, t in tensors.items()}
    return AdapterFile(path, shapes, dtypes, bin_metadata(path), tensors, identity(status))


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
