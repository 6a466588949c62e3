"""The base model's weights by the paths of modules: from a model, or from files without making one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...backends import FileCodes, is_float8
from ...errors import ExportError

#: Files of weights, and what lists the files of those that are split; of transformers and of diffusers.
_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


class BaseModel:
    """Weights and biases of a base model, one at a time.

    Args:
        base: The model, or a directory with its safetensors files.

    Raises:
        ExportError: The directory holds no such files.
    """

    def __init__(self, base: str | os.PathLike[str] | nn.Module) -> None:
        self._read: Callable[[str], Tensor | None]
        self._names: list[str]
        if isinstance(base, nn.Module):
            tensors = dict(base.named_parameters()) | dict(base.named_buffers())
            self._names = list(tensors)
            self._read = lambda name: tensors[name].detach() if name in tensors else None
            return
        self.where = Path(base).expanduser()
        files = _files(self.where)
        self._names = list(files)

        def read(name: str) -> Tensor | None:
            # transformers saves some models without their outer prefix.
            for known in (name, name.partition(".")[2]):
                if known in files:
                    with safe_open(files[known], framework="pt") as file:
                        tensor: Tensor = file.get_tensor(known)
                        return tensor
            return None

        self._read = read

    def tensor(self, path: str, name: str = "weight") -> Tensor | None:
        """The weight or bias of a module, None where there is none of that name."""
        return self._read(f"{path}.{name}")

    def codes(self, path: str) -> str | None:
        """Why the weight of a module holds codes and no values, or None. It must be there."""
        weight, codes = self.tensor(path), FileCodes(self._names)
        assert weight is not None
        for known in (path, path.partition(".")[2]):
            if (reason := codes.why(f"{known}.weight", is_float8(weight))) is not None:
                return reason
        return None if weight.is_floating_point() else f"its weight is stored as {weight.dtype}"

    def paths(self) -> list[str]:
        """The paths of all modules that have a weight."""
        return [name.removesuffix(".weight") for name in self._names if name.endswith(".weight")]


def _files(where: Path) -> dict[str, Path]:
    """Name of a tensor -> the file that holds it."""
    try:
        for name in _NAMES:
            if (where / name).is_file():
                with safe_open(where / name, framework="pt") as file:
                    return {key: where / name for key in file.keys()}  # noqa: SIM118
            index = where / f"{name}.index.json"
            if index.is_file():
                listed: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {key: where / Path(file).name for key, file in listed.items()}
    except (OSError, ValueError, LookupError, AttributeError, SafetensorError) as error:
        raise ExportError(f"the base model's files in {where} cannot be read: {error}") from error
    raise ExportError(f"{where} holds no base model: neither {' nor '.join(_NAMES)}, whole or split")
