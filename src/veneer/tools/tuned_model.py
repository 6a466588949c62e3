"""Whether one model on disk is another one after training."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ops.merging import CHUNK_ELEMENTS
from ..training.model_files import ModelFiles
from ..wording import bullets, listed

#: Options of a model's configuration that say nothing about what its weights compute.
_BESIDE = frozenset(
    "_name_or_path architectures dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id "
    "pad_token_id".split()
)


def check_alike(base: ModelFiles, tuned: ModelFiles) -> None:
    """Check that two models are states of one.

    Raises:
        CheckpointError: They are not; lists everything.
    """
    problems = list(_differences(base, tuned))
    if problems:
        raise CheckpointError(bullets(f"{tuned.place} is not {base.place} after training:", problems, 12))


def _differences(base: ModelFiles, tuned: ModelFiles) -> Iterator[str]:
    kinds = [type(side.model).__name__ for side in (base, tuned)]
    if kinds[0] != kinds[1]:
        yield f"the architecture was {kinds[0]} and is {kinds[1]}"
    for side in (base, tuned):
        for stored, name in side.copies.items():
            if not torch.equal(side.files.read(stored), side.read(name)):
                yield f"{side.place}: {stored} is not {name}, and the model has one weight for both"
    names, others = base.names, tuned.names
    missing, extra = ([n for n in one if n not in two] for one, two in ((names, others), (others, names)))
    for what, tensors in (("missing", missing), ("new", extra)):
        if tensors:
            yield f"{what}: {len(tensors)} tensor{'s' * (len(tensors) > 1)} ({listed(tensors)})"
    for name in names:
        if name not in others:
            continue
        shape = base.entry(name)[1]
        if (other := tuned.entry(name)[1]) != shape:
            yield f"{name} had the shape {shape} and has {other}" + _resized(shape, other)
        for side in (base, tuned):
            reasons = map(side.files.codes, side.sources(name))
            if (reason := next(filter(None, reasons), None)) is not None:
                yield f"{side.place}: {name.rpartition('.')[0]}: {reason}"


def _resized(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    return " (a resized vocabulary?)" if before[1:] == after[1:] and before[0] != after[0] else ""


def change_of(base: ModelFiles, tuned: ModelFiles, name: str) -> Tensor | None:
    """What training changed of a tensor, in float32 or wider; None for nothing.

    Some rows are read at a time, so that neither the two tensors nor their files stay in memory.
    """
    shape, change = base.entry(name)[1], None
    step = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    for rows in [slice(at, at + step) for at in range(0, shape[0], step)] if shape else [None]:
        before, after = base.read(name, rows), tuned.read(name, rows)
        kind = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
        if before.dtype != after.dtype:
            before, after = before.to(kind), after.to(kind)
        if not torch.equal(before, after):
            change = torch.zeros(shape, dtype=kind) if change is None else change
            change[rows] = after.to(kind) - before.to(kind)
        del before, after
    return change


def other_options(base: ModelFiles, tuned: ModelFiles) -> tuple[str, ...]:
    """Options of the model that training changed too; an adapter has no place for them."""
    before, after = (side.model.config.to_dict() for side in (base, tuned))
    names = [n for n in {**before, **after} if n not in _BESIDE and before.get(n) != after.get(n)]
    if not names:
        return ()
    return (f"config.json differs in {listed(names)}, which an adapter does not hold",)
