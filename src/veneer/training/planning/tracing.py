"""Run one training step on the meta device, where tensors are made and freed as usual but take no memory.

That gives the memory kept for the backward pass, the peak, and the FLOPs of any architecture of transformers,
in seconds for 70 billion parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ...inject.base_tensors import embedding_of
from ..losses import chunked_sum, head_of, into_head

#: Allocators hand out memory in pieces of this many bytes: the CPU's of 64, CUDA's of 512.
GRAIN = {"cpu": 64, "cuda": 512}


#: Operations without an implementation for meta that would only write into their first argument.
_IN_PLACE = (torch.ops.aten.index_fill_.int_Scalar, torch.ops.aten.index_copy_.default)


#: FLOPs of products, the in-place ones of the fused step included.
_FLOPS = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}
#: None before torch has it.
_GROUPED: Any = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


@dataclass(frozen=True)
class Trace:
    """What one forward and backward pass takes, in bytes beyond the model's own tensors.

    Attributes:
        activations: In use just before the output head.
        logits: The most on top of that until the loss.
        peak: The most at any moment, gradients included.
        left: In use at the end: the gradients.
        forward_flops: FLOPs of the products of the forward pass, two for a multiplication and an addition.
        flops: FLOPs of both passes.
    """

    activations: int
    logits: int
    peak: int
    left: int
    forward_flops: int
    flops: int


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages from their allocation until they are freed, and FLOPs."""

    def __init__(self, known: Iterator[Tensor], grain: int, answer: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.grain, self.answer = grain, answer
        self.live = self.peak = self.flops = 0
        self.held = [tensor.untyped_storage() for tensor in known]
        self.seen: dict[int, Any] = {storage._cdata: None for storage in self.held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return self.answer  # a model branches on whether the mask is all ones
        if func in _IN_PLACE:
            return args[0]
        out = self._grouped(*args) if func is _GROUPED else func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.count(int(count(*args, **(kwargs or {}), out_val=out)))
        return out

    def _grouped(self, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        """Products of each expert's rows; torch's meta implementation takes bfloat16 only."""
        experts = [] if a.dim() == 2 and b.dim() == 3 else [b.shape[0]] if b.dim() == 3 else rest[0].shape
        self.count(2 * a.shape[-2] * a.shape[-1] * b.shape[-1] * (a.shape[0] if a.dim() == 3 else 1))
        return a.new_empty((*experts, a.shape[-2], b.shape[-1]))

    def restart(self) -> int:
        """Return the peak since the last call, and start a new one."""
        most, self.peak = self.peak, self.live
        return most

    def count(self, flops: int) -> None:
        """Add FLOPs that no dispatched operation stands for."""
        self.flops += flops

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        size = -(-storage.nbytes() // self.grain) * self.grain
        self.live += size

        def freed(_: object) -> None:
            del self.seen[key]
            self.live -= size

        self.seen[key] = weakref.ref(storage, freed)


def _unasked(function: Any) -> Any:
    """A copy of the function that skips its initial check for modes.

    torch disables a mode while it handles a function, and so for everything that this function calls.
    """
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head = _unasked(nn.functional.multi_head_attention_forward)
_backward = _unasked(torch.autograd.backward)


class _KernelsOfAttention(TorchFunctionMode):
    """Attention on meta tensors that keeps queries, keys, values and sums, but not the scores.

    This is what the kernels of real devices do. torch has none for meta and would keep all scores there. With
    dropout the CPU has none either. The mode is active in the current thread only.

    Args:
        device: ``cpu`` or ``cuda``.
        count: Called with the FLOPs of each product.
    """

    def __init__(self, device: str, count: Callable[[int], None]) -> None:
        super().__init__()
        self.device, self.count = device, count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            out = self._attend(*args, **given)
            return func(*args, **given) if out is None else out
        if func is nn.functional.multi_head_attention_forward:
            with self:
                return _multi_head(*args, **given)
        return func(*args, **given)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """What a kernel of the device computes; None where it has none."""
        plain = query.is_meta and query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
        learned = attn_mask is not None and attn_mask.requires_grad
        if not plain or learned or (dropout_p and self.device == "cpu"):
            return None
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        scores = 2 * out.numel() * key.shape[-2] // (2 if is_causal else 1)
        self.count(2 * scores)
        if out.requires_grad:  # the scores once more, and the gradients of the three inputs and of the scores
            out.register_hook(lambda _: self.count(5 * scores))  # type: ignore[no-untyped-call]
        return out


def trace_step(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    device: str = "cpu",
    loss_chunk_size: int = 0,
    padded: bool = False,
) -> Trace:
    """Run one forward and backward pass on the meta device.

    Args:
        model: On the meta device, adapted, with gradients required for what trains.
        inputs: On the meta device, without labels.
        device: Whose kernels and allocator to assume, ``cpu`` or ``cuda``.
        loss_chunk_size: Tokens whose logits are computed at a time, and again in the backward pass; 0 is all.
        padded: Whether the attention mask counts as hiding something.

    Raises:
        Exception: Whatever a model raises that cannot run without values.
    """
    known = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    ledger = _Ledger(known, GRAIN.get(device, GRAIN["cuda"]), answer=not padded)
    before: list[tuple[int, int]] = []  # (alive, the most until then) when the logits begin

    def at_head(*_: Any) -> None:
        if not before:
            before.append((ledger.live, ledger.restart()))

    head = embedding_of(model, "output")
    watching = nullcontext() if head is None else head.register_forward_pre_hook(at_head)
    with ledger, _KernelsOfAttention(device, ledger.count), watching:
        loss = _loss(model, inputs, loss_chunk_size)
        # The scores of a classifier's head are too small to matter.
        kept, most = before[0] if before else (ledger.live, ledger.restart())
        logits = max(0, ledger.peak - kept)
        forward = ledger.flops
        _backward(loss)
        del loss
    return Trace(kept, logits, max(most, ledger.peak), ledger.live, forward, ledger.flops)


def _loss(model: nn.Module, inputs: Mapping[str, Tensor], chunk: int) -> Tensor:
    """A loss over all tokens (or the rows' classes), in float32 as Veneer and transformers compute it."""
    if chunk:
        head = head_of(model)
        hidden = into_head(model, head, inputs)[:, :-1].flatten(0, 1)
        return chunked_sum(head, hidden, _targets(hidden), chunk)
    out = model(**inputs)
    scores = (out["logits"] if "logits" in out else out[0]).float().flatten(0, -2)
    return nn.functional.cross_entropy(scores, _targets(scores), reduction="sum")


def _targets(tokens: Tensor) -> Tensor:
    return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
