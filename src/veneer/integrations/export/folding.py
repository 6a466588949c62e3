"""One scale for all modules: what a configuration cannot say goes into the factors.

A reader scales every update by ``T / r``, with one number T for all modules. Where a module's own
``t = s·r`` differs from T, its B becomes ``(t / T)·B``; where ranks must be equal, A gets rows and B columns
of zeros. Multiplying by a power of two changes no digit; anything else rounds B once, in its own type.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...errors import ExportError, Hint
from ...wording import listed
from .source import Update

#: What a reader's T can be: a whole number, one of 32 bits, any number, or nothing but r.
Alpha = Literal["integer", "float32", "any", "rank"]


@dataclass(frozen=True)
class Rules:
    """How a reader scales.

    Attributes:
        alpha: What its T can be.
        one_rank: Whether all modules have the same rank; else each has that of its factors.
        rslora: Whether it can divide by √r instead.
    """

    alpha: Alpha = "integer"
    one_rank: bool = True
    rslora: bool = False


@dataclass(frozen=True)
class Folded:
    """Updates of one scale.

    Attributes:
        updates: Module path -> update, whose scaling is that of the reader.
        r: The rank of all, or the most common one.
        alpha: T, or what ``use_rslora`` takes for it.
        use_rslora: Whether the reader divides by √r.
        scaled: Modules whose B was multiplied.
        padded: Modules that got zeros.
    """

    updates: dict[str, Update]
    r: int
    alpha: float
    use_rslora: bool
    scaled: tuple[str, ...]
    padded: tuple[str, ...]


def fold(updates: Mapping[str, Update], rules: Rules, dtype: torch.dtype | None = None) -> Folded:
    """Bring updates to one scale, changing as few of them as can be.

    Args:
        updates: Module path -> update.
        rules: Of the reader.
        dtype: Type of the factors; as they are where None.

    Raises:
        ExportError: A factor overflows its type; names the modules.
    """
    ranks = Counter(update.r for update in updates.values())
    r = max(ranks) if rules.one_rank else ranks.most_common(1)[0][0]
    strengths = {p: u.scaling * (r if rules.one_rank else u.r) for p, u in updates.items()}
    alpha, strength, root = _chosen(Counter(strengths.values()), r, rules)
    done, scaled, padded, broken = {}, [], [], []
    for path, update in updates.items():
        # A ratio that is 1 but for the last digits of two divisions is 1.
        factor = strengths[path] / strength
        factor = 1.0 if math.isclose(factor, 1.0, rel_tol=1e-14) else factor
        width = r if rules.one_rank else update.r
        new = _brought(update, factor, width, strength / width, dtype)
        done[path] = new
        if factor != 1.0:
            scaled.append(path)
        if width != update.r:
            padded.append(path)
        if not new.is_finite() and update.is_finite():
            broken.append(path)
    if broken:
        raise ExportError(
            f"the factors of {len(broken)} modules do not fit into {done[broken[0]].b.dtype}: "
            f"{listed(broken)}. Write them with ",
            Hint("dtype", "float32"),
        )
    return Folded(done, r, alpha, root, tuple(scaled), tuple(padded))


def _chosen(strengths: Counter[float], r: int, rules: Rules) -> tuple[float, float, bool]:
    """(alpha to write, T that it means, whether by √r): the most common T that the reader can say."""
    if rules.alpha == "rank":
        return r, float(r), False
    for strength, _ in strengths.most_common():
        if rules.alpha == "any" or (rules.alpha == "float32" and _is_float32(strength)):
            return strength, strength, False
        whole = round(strength)
        if rules.alpha == "integer" and whole and math.isclose(whole, strength, rel_tol=1e-14):
            return whole, float(whole), False
        rooted = strength / math.sqrt(r)
        whole = round(rooted)
        if rules.rslora and whole and math.isclose(whole, rooted, rel_tol=1e-14):
            return whole, whole * math.sqrt(r), True
    return r, float(r), False


def _is_float32(value: float) -> bool:
    (short,) = struct.unpack("<f", struct.pack("<f", value))
    return bool(short == value)


def _brought(update: Update, factor: float, width: int, scaling: float, dtype: torch.dtype | None) -> Update:
    a, b, bias = update.a, update.b, update.bias
    if factor != 1.0:
        b = (b.double() * factor).to(dtype or b.dtype)
        bias = None if bias is None else (bias.double() * factor).to(dtype or bias.dtype)
    if width > update.r:
        a = torch.cat([a, a.new_zeros(width - a.shape[0], *a.shape[1:])])
        b = torch.cat([b, b.new_zeros(b.shape[0], width - b.shape[1], *b.shape[2:])], dim=1)
    if dtype is not None:
        a, b, bias = a.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype)
    return replace(update, a=a, b=b, bias=bias, scaling=scaling)
