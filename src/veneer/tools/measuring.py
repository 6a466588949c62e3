"""Norms and distances of updates on disk, in float64; the dense product is never formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lora_file import FileUpdate
from ..ops import low_rank
from ..wording import span

#: An update: ``(B: (out, r), A: (r, in·k…), s)``, one for each of the experts that share its factors.
Terms = Sequence[low_rank.Term]


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """An adapter whose updates are the nearest of their rank to others.

    Attributes:
        directory: Where it is.
        modules: Module path -> its update, with a rank and an error.
        norm: Norm of all that was to be reached.
        error: Norm of all that is missed, in units of ``norm``.
        notes: What else is to be known.
    """

    directory: Path
    modules: Mapping[str, Any]
    norm: float
    error: float
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> str:
        """The module with the largest error."""
        return max(self.modules, key=lambda path: self.modules[path].error)

    def __str__(self) -> str:
        ranks = [module.rank for module in self.modules.values()]
        return (
            f"{len(ranks)} module{'s' * (len(ranks) != 1)}, rank {span(ranks)}: {self.error:.2%} of the "
            f"update is missed, at most {self.modules[self.worst].error:.2%} ({self.worst})"
        )


def terms_of(update: FileUpdate) -> list[low_rank.Term]:
    """The update of a module."""
    return [(b.double(), a.double(), update.spec.scaling) for b, a in update.pairs()]


def norm(update: Terms) -> float:
    """Frobenius norm of an update, over its experts."""
    return math.hypot(*(abs(s) * low_rank.norm(b, a) for b, a, s in update))


def distance(one: Terms, other: Terms) -> float:
    """Frobenius norm of the difference of two updates of one module."""
    parts = []
    for (b1, a1, s1), (b2, a2, s2) in zip(one, other, strict=True):
        parts.append(low_rank.norm(torch.cat([s1 * b1, -s2 * b2], dim=1), torch.cat([a1, a2])))
    return math.hypot(*parts)


def relative(difference: float, whole: float) -> float:
    """A distance in units of a norm; 0 where both are 0."""
    return difference / whole if whole else 0.0 if not difference else math.inf


def needed(values: Sequence[Tensor], energy: float) -> int:
    """The smallest rank that keeps a share of ``Σσ²`` of matrices of one size, taken together."""
    squares = torch.stack([v.double().square() for v in values]).sum(0)
    kept = squares.cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(kept))
