"""Spectra of the updates in an adapter's files: how large they are and how many directions they use.

The update of a module is ``D = s·B A``. Its singular values are those of the small core ``R₁ R₂ᵀ`` of
``B = Q₁R₁`` and ``Aᵀ = Q₂R₂`` (`ops.low_rank`); the dense product is never formed and no base is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..errors import AdapterFileError, CombineError
from ..lora_file import OpenLora, open_lora, updates
from ..ops import low_rank
from ..wording import bullets

#: "How many directions are needed" means: for this share of the energy.
MOST = 0.99


@dataclass(frozen=True)
class UpdateSpectrum:
    """One module's update, seen through its singular values.

    Attributes:
        path: The module.
        r: Rank it was given.
        scaling: The strength ``s`` that it starts with, inside the values.
        shape: ``(out, in)`` of the update as a matrix; kernels are flattened into ``in``.
        values: Singular values of ``s·B A``, descending. Where one pair of factors holds the updates of
            several experts, those of all of them.
    """

    path: str
    r: int
    scaling: float
    shape: tuple[int, int]
    values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm, ``√Σσ²``."""
        return math.sqrt(math.fsum(v * v for v in self.values))

    @property
    def largest(self) -> float:
        """Spectral norm, σ₁."""
        return self.values[0] if self.values else 0.0

    @property
    def stable_rank(self) -> float:
        """``‖D‖²_F / σ₁²``: never above the rank, and small changes of D change it little; 0 where D is 0.

        Source: Rudelson and Vershynin, Sampling from large matrices, J. ACM 54 (2007), section 1.1.
        """
        return (self.norm / self.largest) ** 2 if self.largest else 0.0

    @property
    def effective_rank(self) -> float:
        """``exp(−Σ pᵢ ln pᵢ)`` with ``pᵢ = σᵢ / Σσ``: the exponential of the values' entropy; 0 where D is 0.

        Source: Roy and Vetterli, The effective rank, EUSIPCO (2007), definition 1.
        """
        total = math.fsum(self.values)
        shares = [v / total for v in self.values if v > 0] if total else []
        return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0

    def energy(self, first: int) -> float:
        """Share of the ``first`` largest values in ``Σσ²``; 1 if D is 0."""
        total = math.fsum(v * v for v in self.values)
        return math.fsum(v * v for v in self.values[:first]) / total if total else 1.0

    def needed(self, share: float = MOST) -> int:
        """How many of the largest values make up a share of ``Σσ²``; 0 if D is 0."""
        total = math.fsum(v * v for v in self.values)
        short = [held for held in accumulate(v * v for v in self.values) if held < share * total]
        return min(len(short) + 1, len(self.values)) if total else 0


def spectra(
    adapter: str | os.PathLike[str] | OpenLora, tell: Callable[[int, int], None] | None = None
) -> list[UpdateSpectrum]:
    """The spectrum of every update of an adapter, from its files.

    For DoRA, that of the low-rank part, before its magnitudes.

    Args:
        adapter: Directory of the adapter, or the result of `open_lora`.
        tell: Called with (updates done, all updates).

    Raises:
        AdapterFileError: The adapter is missing, broken, no LoRA, or not finite; lists the modules.
    """
    lora = open_lora(adapter)
    found, broken = [], []
    for number, update in enumerate(updates(lora), 1):
        spec, pairs = update.spec, update.pairs()
        try:
            values = torch.cat([low_rank.spectrum(b, a) for b, a in pairs]).sort(descending=True).values
        except CombineError as error:
            broken.append(f"{update.path}: {error}")
            continue
        scaled = (values.double() * abs(spec.scaling)).tolist()
        shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])
        found.append(UpdateSpectrum(update.path, spec.r, spec.scaling, shape, tuple(scaled)))
        if tell is not None:
            tell(number, len(lora.specs))
    if broken:
        raise AdapterFileError(
            bullets(
                f"{lora.file.path}: {len(broken)} of {len(lora.specs)} updates cannot be computed:", broken, 5
            )
        )
    return found


@dataclass(frozen=True)
class Grid:
    """A table of numbers by kind of module and layer.

    Attributes:
        layers: Columns, in order: the number of the layer, with what stands before it where that differs.
        before: What stands before every layer's number.
        kinds: Rows: the module's path inside its layer, other numbers replaced by ``*``.
        values: ``values[row][column]``, means where several updates meet, None where there is none.
    """

    layers: list[str]
    before: str
    kinds: list[str]
    values: list[list[float | None]]


def grid(updates: Sequence[UpdateSpectrum], value: Callable[[UpdateSpectrum], float]) -> Grid:
    """One number of each update over layers and kinds of module."""
    cells: dict[tuple[str, tuple[str, int]], list[float]] = {}
    for update in updates:
        before, number, kind = _place(update.path)
        cells.setdefault((kind, (before, number)), []).append(value(update))
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    prefixes = list(dict.fromkeys(layer[0] for _, layer in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: (prefixes.index(layer[0]), layer[1]))
    numbered = [prefix for prefix in prefixes if prefix]
    shared = numbered[0] if len(numbered) == 1 else ""
    names = [
        "–" if number < 0 else str(number) if prefix == shared else f"{prefix}.{number}"
        for prefix, number in layers
    ]
    table: list[list[float | None]] = [
        [_mean(cells.get((kind, layer))) for layer in layers] for kind in kinds
    ]
    return Grid(names, shared, kinds, table)


def _place(path: str) -> tuple[str, int, str]:
    """(what stands before the first number, that number or −1, the rest) of a module's path."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None or first == len(parts) - 1:
        return "", -1, re.sub(r"(?<=\.)\d+$", "*", path)
    kind = ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])
    return ".".join(parts[:first]), int(parts[first]), kind


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def as_json(updates: Sequence[UpdateSpectrum], first: int) -> Iterator[dict[str, Any]]:
    """Each update as plain values."""
    for update in updates:
        yield {
            "module": update.path,
            "r": update.r,
            "scaling": update.scaling,
            "shape": list(update.shape),
            "norm": update.norm,
            "spectral_norm": update.largest,
            "stable_rank": update.stable_rank,
            "effective_rank": update.effective_rank,
            "energy_first": {"k": first, "share": update.energy(first)},
            "rank_for_99_percent": update.needed(),
            "singular_values": list(update.values),
        }
