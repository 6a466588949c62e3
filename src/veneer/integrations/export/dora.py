"""DoRA to plain LoRA: the closest update of a given rank, and its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import ExportError
from ...ops import low_rank
from ...ops.svd import truncated_svd
from ...variants.dora import MAGNITUDE, Dora
from ...wording import listed
from .base_model import BaseModel
from .source import Source, Update


@dataclass(frozen=True)
class Lost:
    """What one module loses on becoming plain.

    Attributes:
        update: ``‖D − B A‖ / ‖D‖``, as a share of its update.
        output: ``‖D − B A‖ / ‖W + D‖``, as a share of its output for inputs that prefer no direction.
    """

    update: float
    output: float


@torch.no_grad()
def dora_to_plain(
    source: Source, base: BaseModel, rank: int, tell: Callable[[int, int], None] | None = None
) -> tuple[Source, dict[str, Lost]]:
    """An adapter without magnitudes whose updates are the nearest of a rank.

    ``D = m ⊙ (W + s·BA) / ‖W + s·BA‖ − W`` row by row; its first singular values make ``B = U √S`` and
    ``A = √S Vᵀ``, with a scale of 1.

    Args:
        source: A DoRA.
        base: Its base model.
        rank: Of the result.
        tell: Called with (how many are done, how many there are).

    Returns:
        The adapter, and what each module loses.

    Raises:
        ExportError: The base lacks a weight, or has one of another shape, such as that of a grouped
            convolution; lists them.

    Source: Eckart and Young, Psychometrika 1 (1936).
    """
    mine = {path: update for path, update in source.updates.items() if update.magnitude is not None}
    wrong = [
        problem
        for path, update in mine.items()
        if (problem := _problem(path, update, base, _turned(update, source)))
    ]
    if wrong:
        raise ExportError(f"these modules of {source.directory} cannot be made plain: {listed(wrong)}")
    done, errors = dict(source.updates), {}
    for number, (path, update) in enumerate(mine.items(), 1):
        done[path], errors[path] = _plain(update, _matrix(base, path, _turned(update, source)), rank)
        if tell is not None:
            tell(number, len(mine))
    config = replace(source.config, use_dora=False, rank_pattern={}, alpha_pattern={}, r=rank)
    return replace(source, config=config, updates=done), errors


def _turned(update: Update, source: Source) -> bool:
    """Whether the weight is (in, out): that of a lookup, or of a linear layer by the configuration."""
    return bool(update.embedding) or (update.a.dim() == 2 and source.config.fan_in_fan_out)


def _matrix(base: BaseModel, path: str, turned: bool) -> Tensor:
    weight = base.tensor(path)
    assert weight is not None
    return (weight.t() if turned else weight.flatten(1)).float()


def _problem(path: str, update: Update, base: BaseModel, turned: bool) -> str | None:
    weight = base.tensor(path)
    if weight is None:
        return f"the base has no {path}.weight"
    if (reason := base.codes(path)) is not None:
        return f"{path}: {reason}"
    shape = (update.b.shape[0], *update.a.shape[1:])
    if tuple(weight.shape) != (shape[::-1] if turned else shape):
        return f"{path}.weight has the shape {tuple(weight.shape)}, its update {shape}"
    return None


def _plain(update: Update, weight: Tensor, rank: int) -> tuple[Update, Lost]:
    delta = update.scaling * (update.b.flatten(1).float() @ update.a.flatten(1).float())
    assert update.magnitude is not None
    change = Dora().merged(weight, delta, {MAGNITUDE: update.magnitude.float()}) - weight
    b, a, _ = low_rank.cut(*truncated_svd(change, rank), min(rank, *change.shape))
    b, a = b.to(update.b.dtype), a.to(update.a.dtype)
    missed = change - b.float() @ a.float()
    a, b = a.reshape(-1, *update.a.shape[1:]), b.reshape(*b.shape, *update.b.shape[2:])
    new = Update(a.contiguous(), b.contiguous(), 1.0, update.embedding, update.bias)
    return new, Lost(_share(missed, change), _share(missed, weight + change))


def _share(part: Tensor, whole: Tensor) -> float:
    norm = float(torch.linalg.matrix_norm(whole))
    return float(torch.linalg.matrix_norm(part)) / norm if norm else 0.0
