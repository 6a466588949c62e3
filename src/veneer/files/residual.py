"""The frozen term of an adapter on disk: a plain adapter of twice the rank, marked.

In memory an adapter whose initialisation subtracts its start has ``A, B`` and, frozen, ``A₀, B₀``. On disk it
is the plain adapter ``A' = [A; A₀]``, ``B' = [B, −B₀]`` with ``r' = 2r`` and the same scaling, which every
reader understands. The metadata of the safetensors file say what it was, so that it can be split again,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

#: Names of ``A₀`` and ``B₀`` below a layer's path.
PARTS = ("lora_residual_A", "lora_residual_B")

_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def layers_of(names: Collection[str]) -> list[str]:
    """The layers that have a frozen term, with a dot behind each, among names of tensors."""
    return [name.removesuffix(PARTS[0]) for name in names if name.endswith(PARTS[0])]


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every frozen term as a part of plain factors of twice the rank."""
    result = dict(tensors)
    for layer in layers_of(tensors):
        a0, b0 = (result.pop(f"{layer}{part}") for part in PARTS)
        a, b = next(pair for pair in _FACTORS if f"{layer}{pair[0]}" in result)
        result[f"{layer}{a}"] = torch.cat([result[f"{layer}{a}"], a0])
        result[f"{layer}{b}"] = torch.cat([result[f"{layer}{b}"], -b0], dim=1)
    return result


def parted(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The inverse of `joined` for the layers that have a frozen term in ``shapes``.

    Tensors that are not of twice the rank there are left as they are.

    Args:
        tensors: By their names on disk.
        shapes: Names and shapes of all tensors of the adapter as it is in memory.
    """
    result = dict(tensors)
    for layer in layers_of(shapes):
        for (a, b), part_a, part_b in ((pair, *PARTS) for pair in _FACTORS):
            name_a, name_b = f"{layer}{a}", f"{layer}{b}"
            if not (name_a in result and name_b in result and name_a in shapes):
                continue
            whole_a, whole_b, r = result[name_a], result[name_b], shapes[name_a][0]
            if whole_a.dim() < 2 or whole_b.dim() < 2 or not whole_a.shape[0] == whole_b.shape[1] == 2 * r:
                continue
            result[name_a], result[f"{layer}{part_a}"] = whole_a[:r], whole_a[r:]
            result[name_b], result[f"{layer}{part_b}"] = whole_b[:, :r], -whole_b[:, r:]
    return result
