"""What the readers of this folder share: they know formats of files, and nothing of Veneer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


class Refused(Exception):
    """What the library behind the reader would stop at, or ignore without a word."""


def json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def product(b: Tensor, a: Tensor, scale: float) -> Tensor:
    """``scale · B A`` in double precision, shaped as the weight: (out, in[, k…])."""
    whole = scale * (b.double().flatten(1) @ a.double().flatten(1))
    return whole.view(b.shape[0], *a.shape[1:])
