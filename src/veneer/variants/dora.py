"""DoRA: the direction of each row of the weight gets a low-rank update, its length is trained separately."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from veneer.errors import Hint, Text
from veneer.ops.dropout import wants_plain_torch
from veneer.ops.row_norms import State, squared_row_norms, updated_row_norms
from veneer.spec import LoraSpec
from veneer.variants.base import Branch, ParameterRequest, Variant, scaled_branch

MAGNITUDE = "lora_magnitude_vector"

#: Row norms of each layer, with the states of the tensors that they were computed from.
_memos: WeakKeyDictionary[Any, dict[Any, tuple[object, Tensor]]] = WeakKeyDictionary()


class Dora(Variant):
    """``W' = m ⊙ (W + s·BA) / ‖W + s·BA‖``, row by row; m starts at ``‖W + s·BA‖``.

    The norm is a constant to the gradient. It comes from low-rank algebra:
    ``‖W + s·BA‖² = ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖²``. The bias of the base is not scaled. With dropout, the base
    sees the dropped input too in what is added: ``y = W x + b + (c − 1) W x̃ + c s·BA x̃``, with
    ``c = m / ‖W + s·BA‖``.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equations 5 and 11; with dropout
    as in the reference implementation.
    """

    name = "dora"

    def refuses(self, spec: LoraSpec, layer_type: str) -> Text | None:
        # Whether the magnitude scales the bias of B is not defined.
        both = Text(Hint("use_dora"), " and ", Hint("lora_bias"), " exclude one another: choose one")
        return both if spec.lora_bias else None

    def shapes(self, request: ParameterRequest) -> Mapping[str, tuple[int, ...]]:
        return {MAGNITUDE: request.vector_shape}

    @torch.no_grad()
    def parameters(self, request: ParameterRequest) -> Mapping[str, Tensor]:
        """The norms of the rows at the start."""
        weight = request.matrix()
        b, a = (factor.to(weight.device) for factor in request.update())
        norms = updated_row_norms(squared_row_norms(weight), weight, b, a, request.spec.scaling)
        return {MAGNITUDE: norms.view(request.vector_shape)}

    def forward(
        self, layer: Branch, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]
    ) -> Tensor:
        """``result + (c − 1) W x̃ + c s·BA x̃``."""
        scale = self.output_scale(layer, name)  # first: it refuses a base that is held in pieces
        dropped = layer.dropped(name, x)
        if layer.dropout_of(name):
            plain = layer.base_linear(dropped.to(x.device)).to(result)
        else:
            plain = layer.without_bias(base())
        return result + scaled_branch(layer, name, dropped, plain, scale).to(result)

    def merged(self, weight: Tensor, delta: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """``m ⊙ (W + ΔW) / ‖W + ΔW‖``."""
        total = weight + delta
        norms = torch.linalg.vector_norm(total, dim=1)
        return total * (extra[MAGNITUDE].reshape(-1) / _safe(norms)).unsqueeze(1)

    def output_scale(self, layer: Branch, name: str) -> Tensor:
        """``m / ‖W + s·BA‖``; only m gets its gradient."""
        magnitude = layer.extra(name)[MAGNITUDE]
        norms = _safe(self._norms(layer, name, torch.is_grad_enabled())).to(magnitude.device)
        return layer.along_output(magnitude.reshape(-1) / norms)

    @torch.no_grad()
    def _norms(self, layer: Branch, name: str, grad: bool) -> Tensor:
        """``‖W + s·BA‖`` of each row, (out,); cached in evaluation until one of its tensors changes."""
        b, a = layer.update(name)
        scaling = layer.strength(name)
        states = None if wants_plain_torch(a, b) else layer.weight_state()
        if states is None:
            weight = layer.matrix()
            return updated_row_norms(squared_row_norms(weight), weight, b, a, scaling)
        memo = _memos.setdefault(layer, {})
        settled = not (layer.training or grad)
        key = (states, State.of(a, b), scaling) if settled else None
        known = memo.pop(name, None)
        if settled and known is not None and known[0] == key:
            memo[name] = known
            return known[1]
        weight = layer.matrix()
        squared = memo.get(None)
        if squared is None or squared[0] != states:
            squared = memo[None] = (states, squared_row_norms(weight))
        norms = updated_row_norms(squared[1], weight, b, a, scaling)
        if key is not None and key[1] is not None:
            memo[name] = (key, norms)
        return norms


def _safe(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, 1.0)
