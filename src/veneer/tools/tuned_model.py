"""Whether one model on disk is another one after training."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import CheckpointError, Text
from ..training.model_files import ModelFiles
from ..wording import listed, some

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
        raise CheckpointError(
            Text.join(
                "\n  - ",
                [f"{tuned.place} is not {base.place} after training:", *some(problems, 12)],
            )
        )


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
            if (reason := side.files.codes(side.stored.get(name, name))) is not None:
                yield f"{side.place}: {name.rpartition('.')[0]}: {reason}"


def _resized(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    return " (a resized vocabulary?)" if before[1:] == after[1:] and before[0] != after[0] else ""


def other_options(base: ModelFiles, tuned: ModelFiles) -> tuple[str, ...]:
    """Options of the model that training changed too; an adapter has no place for them."""
    before, after = (side.model.config.to_dict() for side in (base, tuned))
    names = [n for n in {**before, **after} if n not in _BESIDE and before.get(n) != after.get(n)]
    if not names:
        return ()
    return (f"config.json differs in {listed(names)}, which an adapter does not hold",)
