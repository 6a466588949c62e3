"""The safetensors files of a base model, read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.backends import FileCodes
from veneer.errors import CheckpointError

#: Files of weights as transformers and as diffusers call them; what lists the parts of one that is split is
#: called like it, with ``.index.json``.
WEIGHTS, DIFFUSION_WEIGHTS = "model.safetensors", "diffusion_pytorch_model.safetensors"


class BaseFiles:
    """The tensors of a base model by name; headers are read at once, each tensor when it is asked for.

    Args:
        where: Directory of the model, or one file.
        names: Names that a file of weights may have.
        prefix: What the files may put before the names that the model has.

    Attributes:
        headers: For each file, type and shape of its tensors, in the order of their bytes.

    Raises:
        CheckpointError: There are no such files, one is missing, or one cannot be read.
    """

    def __init__(
        self, where: str | os.PathLike[str], names: Sequence[str] = (WEIGHTS,), prefix: str = ""
    ) -> None:
        self.prefix = prefix
        self.headers = {file: _header(file) for file in _files(Path(where).expanduser(), names)}
        self._file = {name: file for file, header in self.headers.items() for name in header}
        self._codes = FileCodes(self._file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def stored_name(self, name: str) -> str | None:
        """What the files call a tensor of the model; some are saved without the model's outermost name."""
        known = (name, name.partition(".")[2], *([f"{self.prefix}.{name}"] if self.prefix else []))
        return next((found for found in known if found in self._file), None)

    def entry(self, stored: str) -> tuple[str, tuple[int, ...]]:
        """Type, as safetensors writes it, and shape of a tensor."""
        return self.headers[self._file[stored]][stored]

    def codes(self, stored: str) -> str | None:
        return self._codes.why(stored, self.entry(stored)[0].startswith(("F8", "F4")))

    def reader(self, name: str) -> Callable[[], Tensor] | None:
        """What reads a tensor of the model; None where the files have none of this name."""
        stored = self.stored_name(name)
        return None if stored is None else partial(self.read, stored)

    def read(self, stored: str) -> Tensor:
        """One tensor."""
        with opened(self._file[stored]) as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def read_rows(self, stored: str, rows: slice) -> Tensor:
        """A copy of some rows of a tensor; nothing of the file stays in memory."""
        with opened(self._file[stored]) as file:
            tensor: Tensor = file.get_slice(stored)[rows]
            return tensor.clone()


def _files(where: Path, names: Sequence[str]) -> list[Path]:
    if where.is_file():
        return [where]
    for name in names:
        if (where / name).is_file():
            return [where / name]
        index = where / f"{name}.index.json"
        if index.is_file():
            try:
                listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index} is damaged and cannot be read: {error}") from error
            # A name with a directory in it would lead elsewhere.
            missing = [n for n in listed if Path(str(n)).name != n or not (where / n).is_file()]
            if missing:
                names_of = ", ".join(sorted(map(str, missing))[:3])
                raise CheckpointError(f"{where} lacks {names_of}, which its index names")
            return [where / n for n in sorted(listed)]
    wanted = (file for name in names for file in (name, f"{name}.index.json"))
    raise CheckpointError(f"{where} holds neither {' nor '.join(wanted)}")


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with opened(file) as source:
        slices = {name: source.get_slice(name) for name in source.offset_keys()}
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def opened(file: Path) -> safe_open:
    """A safetensors file, to be used in a ``with`` statement.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
