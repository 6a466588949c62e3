"""aLoRA: the adapter acts from its invocation tokens on; before them the model is its base.

The variant computes with the positions of a call; `find_activation` reads them from the call's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.errors import RoutingError
from veneer.spec import LoraSpec
from veneer.variants.base import Branch, Variant
from veneer.wording import warn

#: Ways of generating in which a call of the model has neither all positions nor the last one.
_NOT_ONE_BY_ONE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


class ALora(Variant):
    """``y_t = W x_t + s·BA x_t`` for positions t from the last invocation on, ``W x_t`` before.

    Before its invocation the keys and values of a text are those of the base model, and can be shared. The
    positions belong to the call, not to the layer, which looks them up while it runs.

    Source: Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", 2025, section 3.
    """

    name = "alora"
    reads_weight = False

    def refuses(self, spec: LoraSpec, layer_type: str) -> str | None:
        # Only layers that map (batch, tokens, in) row by row have positions.
        if "Linear" in layer_type or layer_type == "Conv1D":
            return None
        return f"aLoRA acts on positions of a text, and the input of a {layer_type} is not laid out by them"

    def refuses_merge(self, spec: LoraSpec) -> str | None:
        return (
            f"{spec.adapter!r} is an aLoRA, which acts on the positions from its invocation on and not "
            "before it: no weight does that. Keep it unmerged"
        )

    def forward(
        self, layer: Branch, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]
    ) -> Tensor:
        """``result + s·BA x`` where the adapter acts, ``result`` elsewhere."""
        where = layer.acting(name, x).unsqueeze(-1)
        if torch.is_grad_enabled():  # the factors' gradients are sums over all positions
            x = torch.where(where.to(x.device), x, x.new_zeros(()))
        # What is added to may be written in place.
        return torch.where(where.to(result.device), layer.add_branch(name, x, result.clone()), result)

    def merged(self, weight: Tensor, delta: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """The weight on the positions where it acts; `refuses_merge` prevents a merge."""
        return weight + delta


@dataclass(frozen=True)
class Activation:
    """The positions from which invoked adapters (aLoRA) act, in each row of a batch.

    Args:
        offsets: For each adapter and row, on how many of the last positions of the input it acts; None for
            none.
        length: Number of positions of the input; 0 if unknown, so that offsets count from the end.
        grows: Whether more positions may follow the input (`generate`).
    """

    offsets: Mapping[str, Sequence[int | None]]
    length: int = 0
    grows: bool = False

    def starts(self, name: str, rows: Sequence[int], tokens: int, where: str) -> list[int]:
        """The first position on which an adapter acts, in rows of a layer's input with ``tokens`` positions.

        Raises:
            RoutingError: The positions are not those of the input.
        """
        beyond = tokens - self.length if self.length and tokens > self.length else 0
        if beyond and not self.grows:
            raise RoutingError(
                f"the input of the model has {self.length} positions and that of {where} {tokens}: from "
                f"which of them on {name!r} acts is unknown. Pass alora_offsets, counted from the end"
            )
        counts = [self.offsets[name][row] for row in rows]
        return [tokens if count is None else max(tokens - beyond - count, 0) for count in counts]


def find_activation(
    tokens: Mapping[str, Sequence[int]],
    offsets: Sequence[int | None] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    generates: bool = False,
) -> Activation | None:
    """The positions of a call from which its aLoRA adapters act.

    Args:
        tokens: The invocation tokens of each adapter.
        offsets: ``alora_offsets`` of the call, which replace the search for the tokens.
        args: Arguments by position of the model's ``forward`` or ``generate``.
        kwargs: Arguments by keyword.
        generates: Whether it is ``generate``, in which more positions follow.

    Raises:
        RoutingError: The call does not tell where the adapters are invoked.
    """
    if generates and (option := next((k for k in _NOT_ONE_BY_ONE if kwargs.get(k)), None)):
        raise RoutingError(
            f"generate({option}=…) splits the positions into pieces, which aLoRA cannot follow"
        )
    if offsets is not None:
        return Activation({name: list(offsets) for name in tokens}, 0, generates)
    inputs = [kwargs.get("input_ids"), kwargs.get("inputs") if generates else None, *args[:1]]
    ids = next((v for v in inputs if isinstance(v, Tensor) and not v.is_floating_point()), None)
    if ids is not None:
        found = {name: last_invocations(ids, own) for name, own in tokens.items()}
        return Activation(found, ids.shape[-1], generates)
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        raise RoutingError("an aLoRA needs input_ids or alora_offsets to know where it is invoked")
    warn(
        "without input_ids an aLoRA does not know where it is invoked, so this call computes what the base "
        "model does. Pass alora_offsets"
    )
    return Activation({name: [None] * len(embeds) for name in tokens})


def last_invocations(input_ids: Tensor, tokens: Sequence[int]) -> list[int | None]:
    """For each row, the number of positions from the last occurrence of ``tokens`` to the end, or None.

    input_ids: (rows, length) or (length,).
    """
    ids = input_ids.reshape(-1, input_ids.shape[-1]).cpu()
    length, size = ids.shape[1], len(tokens)
    if length < size:
        return [None] * ids.shape[0]
    hits = (ids.unfold(1, size, 1) == torch.tensor(list(tokens))).all(-1)
    return [length - int(row.nonzero()[-1]) if bool(row.any()) else None for row in hits]
