"""Torch's transformer encoder, whose fused kernels call no submodule."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.adapters import AdapterSet, walk
from veneer.layers import LoraLayer

#: Where torch's transformer encoder keeps, while it holds adapters, whether it packs padded batches.
_NESTED = "_use_nested_tensor_without_adapters"


def _no_op(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: its presence is what counts."""


def keep_out_of_fused_kernels(model: nn.Module) -> None:
    """Torch's transformer encoder, in evaluation, hands weights to one kernel and calls no submodule.

    It does not where a submodule has a hook, nor where nested tensors are switched off.
    """
    for _, module in walk(model):
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in (module.self_attn, module.linear1, module.linear2):
                if isinstance(child, LoraLayer) and not child._forward_hooks:
                    child.register_forward_hook(_no_op)
        elif isinstance(module, nn.TransformerEncoder) and AdapterSet(module).modules():
            module.__dict__.setdefault(_NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False


def give_back_fused_kernels(model: nn.Module) -> None:
    """Let encoders without adapters pack padded batches again, if they did before."""
    for _, module in walk(model):
        if _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)
