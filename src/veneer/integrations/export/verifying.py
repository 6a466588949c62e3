"""What was written against what was meant: every module's update, from the files themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ExportError
from ...ops import low_rank
from ...wording import listed
from .source import Update

#: Two products of 53 bits each, of the same numbers in another order.
_SAME = 4 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Compared:
    """One module.

    Attributes:
        exact: Whether ``s·B A`` is the same, A's and s·B's elements one by one.
        error: Norm of the difference of the updates, relative to that of the update; 0.0 where it is exact.
    """

    exact: bool
    error: float


def compare(meant: Mapping[str, Update], read: Mapping[str, Update]) -> dict[str, Compared]:
    """Compare the updates that a file holds with those that it should hold.

    Elements of A and of ``s·B`` may differ by one rounding to the file's type and by nothing else.

    Raises:
        ExportError: A module is missing, or is not that of the source; names all of them.
    """
    wrong = [f"{path} is missing" for path in meant if path not in read]
    wrong += [f"{path} should not be there" for path in read if path not in meant]
    found = {}
    for path in meant:
        if path in read:
            result = _compared(meant[path], read[path])
            if isinstance(result, str):
                wrong.append(f"{path}: {result}")
            else:
                found[path] = result
    if wrong:
        raise ExportError(
            "what was written does not read back as the adapter, so it was removed: " + listed(wrong)
        )
    return found


def _compared(meant: Update, read: Update) -> Compared | str:
    if read.embedding is not None and meant.embedding != read.embedding:
        return "an embedding was mistaken for a linear layer, or the reverse"
    r = meant.r
    if read.r < r or read.a.shape[1:] != meant.a.shape[1:] or read.b.shape[0] != meant.b.shape[0]:
        return f"its factors have the shapes {tuple(read.a.shape)} and {tuple(read.b.shape)}"
    if read.a[r:].any() or read.b[:, r:].any():
        return "its padding is not zero"
    pairs: list[tuple[Tensor | None, Tensor | None, float, float]] = [
        (meant.a, read.a[:r], 1.0, 1.0),
        (meant.b, read.b[:, :r], meant.scaling, read.scaling),
        (meant.bias, read.bias, meant.scaling, read.scaling),
        (meant.magnitude, read.magnitude, 1.0, 1.0),
    ]
    exact = True
    for first, second, s, t in pairs:
        if (first is None) != (second is None):
            return "a bias or magnitude is missing, or there is one too many"
        if first is not None and second is not None:
            same = _same(first, second, s, t)
            if same is None:
                return "its values differ"
            exact = exact and same
    return Compared(exact, 0.0 if exact else _error(meant, read))


def _same(meant: Tensor, read: Tensor, s: float, t: float) -> bool | None:
    """Whether ``s·meant`` is ``t·read``; None where one rounding cannot explain the difference."""
    target, value = meant.double().flatten() * s, read.double().flatten() * t
    if target.shape != value.shape:
        return None
    off = (target - value).abs()
    if bool((off <= _SAME * target.abs()).all()):
        return True
    info = torch.finfo(read.dtype)
    rounding = info.eps / 2 * target.abs() * (1 + info.eps) + info.tiny * info.eps * abs(t)
    return False if bool((off <= rounding).all()) else None


def _error(meant: Update, read: Update) -> float:
    a1, b1 = meant.a.flatten(1).double(), meant.b.flatten(1).double() * meant.scaling
    a2, b2 = read.a.flatten(1).double(), read.b.flatten(1).double() * read.scaling
    whole = low_rank.norm(b1, a1)
    apart = low_rank.norm(torch.cat([b1, -b2], dim=1), torch.cat([a1, a2]))
    return apart / whole if whole else 0.0
