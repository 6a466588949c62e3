"""The factors of experts, whatever file they are from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: The projections of an expert, or the stack that joins the first two.
PARTS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Factors:
    """The updates ``s·B A`` of one projection of all experts.

    Attributes:
        a: A (E, r, in), or (1, r, in) if all experts have the same.
        b: B (E, out, r), or (1, out, r).
        scaling: s.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def count(self) -> int:
        """The number of experts."""
        return max(len(self.a), len(self.b))

    @property
    def r(self) -> int:
        return self.a.shape[1]

    def delta(self, expert: int) -> Tensor:
        """ΔW of an expert, (out, in), in float64."""
        a, b = self.a[expert % len(self.a)], self.b[expert % len(self.b)]
        return self.scaling * (b.double() @ a.double())

    def expanded(self) -> Factors:
        """With a pair of factors for every expert."""
        count = self.count
        return replace(self, a=self.a.expand(count, -1, -1), b=self.b.expand(count, -1, -1))


#: The path of a module ``experts``, as in the file -> its projections.
Experts = Mapping[str, Mapping[str, Factors]]


def joined(gate: Factors, up: Factors, interleaved: bool) -> Factors:
    """Gate and up as one update: of rank 2r with B block-diagonal, or of rank r if both have the same A.

    If they differ in strength, that of up is multiplied into its B.
    """
    gate, up = gate.expanded(), up.expanded()
    if gate.scaling != up.scaling:
        ratio = up.scaling / gate.scaling
        up = replace(up, b=(up.b.double() * ratio).to(up.b.dtype), scaling=gate.scaling)
    if torch.equal(gate.a, up.a):
        return replace(gate, b=_rows(gate.b, up.b, interleaved))
    left = torch.cat([gate.b, gate.b.new_zeros(*gate.b.shape[:2], up.r)], dim=2)
    right = torch.cat([up.b.new_zeros(*up.b.shape[:2], gate.r), up.b], dim=2)
    return replace(gate, a=torch.cat([gate.a, up.a], dim=1), b=_rows(left, right, interleaved))


def parted(both: Factors, interleaved: bool, one_a: bool = False) -> tuple[Factors, Factors]:
    """The inverse of `joined`.

    Args:
        both: Gate and up in one.
        interleaved: Whether their rows alternate.
        one_a: Give both the whole A, even where B is block-diagonal.
    """
    rows = both.b.shape[1] // 2
    gate, up = (both.b[:, 0::2], both.b[:, 1::2]) if interleaved else (both.b[:, :rows], both.b[:, rows:])
    half = both.r // 2
    diagonal = both.r % 2 == 0 and bool(both.b.any()) and not (gate[..., half:].any() or up[..., :half].any())
    if diagonal and not one_a:
        parts = (both.a[:, :half], gate[..., :half]), (both.a[:, half:], up[..., half:])
    else:
        parts = (both.a, gate), (both.a, up)
    first, second = (replace(both, a=a, b=b) for a, b in parts)
    return first, second


def only(tensor: Tensor) -> Tensor | None:
    """What all experts have alike, (1, …); None where they differ."""
    first = tensor[:1]
    return first if torch.equal(tensor, first.expand_as(tensor)) else None


def _rows(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    if not interleaved:
        return torch.cat([gate, up], dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def without_halves(found: Iterable[str]) -> str | None:
    """Which of gate and up is there without the other, or None."""
    lone = {"gate_proj", "up_proj"} & set(found)
    return lone.pop() if len(lone) == 1 else None
