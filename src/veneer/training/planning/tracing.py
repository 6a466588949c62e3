"""One training step on the meta device: every tensor is made and freed as it would be, none has any memory.

That gives what a step keeps for its backward pass, the most that lives at one moment, and the products it
computes, of any architecture that transformers can run, in seconds for 70 billion parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    """What one forward and backward pass did, in bytes beyond the model's own tensors.

    Attributes:
        activations: Alive when the logits begin to be made.
        logits: What came on top of that until the loss was there, at most.
        peak: The most that was alive at one moment, gradients included.
        left: Alive at the end: the gradients.
        forward_flops: Of the products of the forward pass, a multiplication and an addition being two.
        flops: Of both passes.
    """

    activations: int
    logits: int
    peak: int
    left: int
    forward_flops: int
    flops: int


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, until they are freed, and the operations' FLOPs."""

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
            return self.answer  # models ask whether a mask hides nothing
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
        """Products of each expert's rows; the implementation for meta knows bfloat16 alone."""
        experts = [] if a.dim() == 2 and b.dim() == 3 else [b.shape[0]] if b.dim() == 3 else rest[0].shape
        self.count(2 * a.shape[-2] * a.shape[-1] * b.shape[-1] * (a.shape[0] if a.dim() == 3 else 1))
        return a.new_empty((*experts, a.shape[-2], b.shape[-1]))

    def restart(self) -> int:
        """The most that was alive since the last call; from now on it is what is alive now."""
        most, self.peak = self.peak, self.live
        return most

    def count(self, flops: int) -> None:
        """Note products that no operation seen here stands for."""
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
    """The function without the question whether a mode overrides it, with which it begins.

    torch leaves a mode to run what the mode was asked about, and with it all that this calls in its turn.
    """
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head = _unasked(nn.functional.multi_head_attention_forward)
_backward = _unasked(torch.autograd.backward)


class _KernelsOfAttention(TorchFunctionMode):
    """On meta tensors, attention that keeps queries, keys, values and sums instead of the scores.

    That is what the devices' kernels do. torch chooses the kernel by the device of the tensors and has none
    for meta, where it would keep every score. With dropout a CPU has none either. Other threads do not see
    any of this.

    Args:
        device: ``cpu`` or ``cuda``.
        count: Told the FLOPs of each forward product.
    """

    def __init__(self, device: str, count: Callable[[int], None]) -> None:
        super().__init__()
        self.device, self.count = device, count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and self._fits(*args, **given):
            return self._attend(*args, **given)
        if func is nn.functional.multi_head_attention_forward:
            with self:
                return _multi_head(*args, **given)
        return func(*args, **given)

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *rest: Any,
        **more: Any,
    ) -> bool:
        fits = query.is_meta and query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
        learned = attn_mask is not None and attn_mask.requires_grad
        return fits and not learned and not (dropout_p and self.device == "cpu")

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
    ) -> Tensor:
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
        model: On the meta device, adapted, its trainable parameters requiring gradients.
        inputs: On the meta device too; labels are not needed.
        device: ``cpu`` or ``cuda``: whose kernels and allocator.
        loss_chunk_size: Tokens whose logits are computed at a time, and again in the backward pass; 0 is all.
        padded: What the model is told when it asks whether the mask among the inputs hides anything.

    Returns:
        Bytes and FLOPs.

    Raises:
        Exception: Whatever the model raises that cannot run without values.
    """
    known = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    ledger = _Ledger(known, GRAIN.get(device, GRAIN["cuda"]), answer=not padded)
    before: list[tuple[int, int]] = []  # (alive, the most until then) when the logits begin

    def at_head() -> None:
        if not before:
            before.append((ledger.live, ledger.restart()))

    with ledger, _KernelsOfAttention(device, ledger.count), _watching_head(model, at_head):
        loss = _loss(model, inputs, loss_chunk_size)
        # Heads that are no output projection make scores of no size worth telling apart.
        kept, most = before[0] if before else (ledger.live, ledger.restart())
        logits = max(0, ledger.peak - kept)
        forward = ledger.flops
        _backward(loss)
        del loss
    return Trace(kept, logits, max(most, ledger.peak), ledger.live, forward, ledger.flops)


@contextmanager
def _watching_head(model: nn.Module, mark: Callable[[], None]) -> Iterator[None]:
    """Call `mark` before the output projection is called."""
    head = embedding_of(model, "output")
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda *_: mark())
    try:
        yield
    finally:
        handle.remove()


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
