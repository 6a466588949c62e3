"""One batch of the batches of several adapters: rows of each side by side, filled up to one length."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import DataError
from veneer.forward import IGNORED
from veneer.wording import listed

#: What rows of text are filled up with, by the name of the input; the token itself depends on the model.
_FILLING = {"attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": IGNORED}

#: What an adapter is trained on: inputs of the model and whatever its loss needs, by name; (rows, ...).
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Joined:
    """Batches side by side.

    Attributes:
        inputs: What the model is called with, on its device: (rows, ...).
        names: The adapter of each row.
        rows: The rows of each adapter.
        tokens: Of each text of an adapter, before and after filling up: 1 where there is none.
        labels: ``labels`` of all rows, if every batch has them: (rows, length).
    """

    inputs: dict[str, Tensor]
    names: list[str]
    rows: dict[str, slice]
    tokens: dict[str, tuple[int, int]]
    labels: Tensor | None

    def own(self, name: str, output: Any) -> Any:
        """What a model gives for the rows of one adapter, so that no loss reaches those of another.

        Its tensors have as many rows as the batch; those of texts, (rows, length, features), are cut to the
        adapter's own length. Whatever else it holds is None, unless it is a plain value.
        """
        if isinstance(output, Tensor):
            if not output.dim() or len(output) != len(self.names):
                return None
            tokens, filled = self.tokens[name]
            own = output[self.rows[name]]
            return own[:, :tokens] if own.dim() == 3 and own.shape[1] == filled else own
        if isinstance(output, Mapping):
            chosen = {key: self.own(name, value) for key, value in output.items()}
            return type(output)(**chosen) if dataclasses.is_dataclass(output) else chosen
        if isinstance(output, list | tuple):
            every = [self.own(name, value) for value in output]
            return type(output)(*every) if hasattr(output, "_fields") else type(output)(every)
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            fields = [field.name for field in dataclasses.fields(output) if field.init]
            return dataclasses.replace(
                output, **{key: self.own(name, getattr(output, key)) for key in fields}
            )
        return output if isinstance(output, int | float | str) else None


def join(batches: Mapping[str, Batch], model: nn.Module) -> Joined:
    """Put batches side by side.

    Texts of different lengths are filled up on the right, with an attention mask that says so.

    Args:
        batches: By adapter.
        model: What will be called; the names of its arguments say which tensors of a batch are inputs.

    Raises:
        DataError: Listing every batch that does not fit, and how.
    """
    known = set(inspect.signature(model.forward).parameters) - {"labels"}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = {name: {k: v for k, v in batch.items() if k in known} for name, batch in batches.items()}
    _check(batches, inputs, known)
    used = list(dict.fromkeys(key for given in inputs.values() for key in given))
    lengths = {given[key].shape[1] for given in inputs.values() for key in used if key == "input_ids"}
    if len(lengths) > 1 and "attention_mask" in known:
        for given in inputs.values():
            given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        used = list(dict.fromkeys([*used, "attention_mask"]))
    filling = {"input_ids": _padding_token(model), **_FILLING}
    joined = {key: _side_by_side([given[key] for given in inputs.values()], filling.get(key)) for key in used}
    counts = [len(next(iter(given.values()))) for given in inputs.values()]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    labels = [batch["labels"] for batch in batches.values() if "labels" in batch]
    whole = len(labels) == len(batches)
    filled = joined["input_ids"].shape[1] if "input_ids" in joined else 1
    own = {n: given["input_ids"].shape[1] if "input_ids" in given else 1 for n, given in inputs.items()}
    return Joined(
        {key: value.to(device) for key, value in joined.items()},
        [name for name, count in zip(batches, counts, strict=True) for _ in range(count)],
        {n: slice(s, s + c) for n, s, c in zip(batches, starts, counts, strict=True)},
        {name: (tokens, filled) for name, tokens in own.items()},
        _side_by_side(labels, IGNORED).to(device) if whole else None,
    )


def _check(batches: Mapping[str, Batch], inputs: Mapping[str, Mapping[str, Tensor]], known: set[str]) -> None:
    problems = []
    every = {key for given in inputs.values() for key in given} - {"attention_mask"}
    shapes: dict[str, set[tuple[int, ...]]] = {key: set() for key in every}
    for name, given in inputs.items():
        if not given:
            problems.append(
                f"{name!r}: none of {listed(batches[name])} is an argument of the model's forward "
                f"({listed(sorted(known))})"
            )
            continue
        rows = {key: len(value) if value.dim() else 0 for key, value in batches[name].items()}
        if len(set(rows.values())) > 1 or not all(rows.values()):
            counts = ", ".join(f"{key} {count}" for key, count in rows.items())
            problems.append(f"{name!r}: every tensor has the same number of rows, at least one, not {counts}")
        if missing := sorted(every - set(given)):
            problems.append(f"{name!r}: {listed(missing)} is missing, which other batches have")
        for key in every & set(given):
            shape = tuple(given[key].shape[1:])
            shapes[key].add(shape[1:] if key in _FILLING or key == "input_ids" else shape)
    for key, found in sorted(shapes.items()):
        if len(found) > 1:
            problems.append(f"{key}: rows of the shapes {listed(map(str, sorted(found)))} make no batch")
    if problems:
        raise DataError(
            "these batches cannot be computed together:\n" + "\n".join(f"  - {text}" for text in problems)
        )


def _padding_token(model: nn.Module) -> int:
    """Never looked at, but it must be a token of the model."""
    config: Any = getattr(model, "config", None)
    token = getattr(config, "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def _side_by_side(tensors: list[Tensor], filling: int | None) -> Tensor:
    if filling is None or len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat(
        [nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=filling) for tensor in tensors]
    )
