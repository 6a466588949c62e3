"""The base model's weights by the paths of modules: from a model, or from files without making one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...backends import FileCodes, is_float8
from ...base_files import DIFFUSION_WEIGHTS, WEIGHTS, BaseFiles
from ...errors import CheckpointError, ExportError


def config_in(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """A model's ``config.json``; empty where there is none."""
    try:
        values = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


class BaseModel:
    """Weights and biases of a base model, one at a time.

    Args:
        base: The model, or a directory with its safetensors files.

    Attributes:
        place: The directory; empty for a model.
        config: The model's configuration, as ``config.json`` has it; empty where there is none.

    Raises:
        ExportError: The directory holds no such files.
    """

    def __init__(self, base: str | os.PathLike[str] | nn.Module) -> None:
        self._find: Callable[[str], Callable[[], Tensor] | None]
        self._names: list[str]
        if isinstance(base, nn.Module):
            tensors = dict(base.named_parameters()) | dict(base.named_buffers())
            self.place = ""
            self.config: dict[str, Any] = getattr(getattr(base, "config", None), "to_dict", dict)()
            self._names = list(tensors)
            self._find = lambda name: tensors[name].detach if name in tensors else None
            return
        try:
            files = BaseFiles(base, (WEIGHTS, DIFFUSION_WEIGHTS))
        except CheckpointError as error:
            raise ExportError(f"no weights of a base model: {error}") from error
        self.place, self.config = str(base), config_in(base)
        self._names = list(files)
        self._find = files.reader

    def tensor(self, path: str, name: str = "weight") -> Tensor | None:
        read = self._find(f"{path}.{name}")
        return None if read is None else read()

    def reader(self, path: str) -> Callable[[], Tensor] | None:
        """What reads the weight of a module; None where there is none, or where it holds codes."""
        read = self._find(f"{path}.weight")
        return None if read is None or self.codes(path) is not None else read

    def codes(self, path: str) -> str | None:
        """Why the weight of a module holds codes and no values, or None. It must be there."""
        weight, codes = self.tensor(path), FileCodes(self._names)
        assert weight is not None
        for known in (path, path.partition(".")[2]):
            if (reason := codes.why(f"{known}.weight", is_float8(weight))) is not None:
                return reason
        return None if weight.is_floating_point() else f"its weight is stored as {weight.dtype}"

    def paths(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self._names if name.endswith(".weight")]
