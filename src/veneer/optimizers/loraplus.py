"""LoRA+: a larger learning rate for B than for A."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import nn
from torch.optim import Optimizer

from veneer.errors import ConfigError, TrainingError
from veneer.layers import LoraLayer

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer with ``lr_B = loraplus_lr_ratio · lr_A``.

    It has four groups: A and everything not named below, with ``lr``; factors of embeddings, with
    ``loraplus_lr_embedding``; B and vectors, with ``lr · loraplus_lr_ratio``; and of these, biases and
    parameters of a `LayerNorm`, without weight decay.

    Args:
        model: A model with trainable adapters.
        optimizer_cls: The class of the optimizer, called with the groups.
        lr: Learning rate of A.
        loraplus_lr_ratio: ``lr_B / lr_A``, at least 1 by the paper; 16 is its usual value.
        **kwargs: ``loraplus_lr_embedding`` (1e-6), ``loraplus_weight_decay`` (0.0), and options of the
            optimizer.

    Raises:
        ConfigError: If the ratio is not positive.
        TrainingError: If nothing in the model requires a gradient.

    Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, section 4.
    """
    if not 0 < loraplus_lr_ratio < math.inf:
        raise ConfigError(f"loraplus_lr_ratio must be a positive number, got {loraplus_lr_ratio!r}")
    weight_decay = kwargs.pop("loraplus_weight_decay", 0.0)
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    tables = {
        id(p)
        for m in model.modules()
        if isinstance(m, LoraLayer) and m.lookup
        for name in m.held_adapters
        for p in m.factors(name)
        if p is not None
    }
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(False)}
    groups: dict[str, list[nn.Parameter]] = {"a": [], "embedding": [], "b": [], "b_no_decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            kind = "embedding"
        elif "lora_B" in name or parameter.ndim == 1:
            kind = "b_no_decay" if "bias" in name or id(parameter) in norms else "b"
        else:
            kind = "a"
        groups[kind].append(parameter)
    if not any(groups.values()):
        raise TrainingError("no parameter requires a gradient: activate an adapter for training first")
    rates = {"a": lr, "embedding": lr_embedding, "b": lr * loraplus_lr_ratio}
    optimizer = optimizer_cls(
        [
            {
                "params": parameters,
                "weight_decay": 0.0 if kind == "b_no_decay" else weight_decay,
                "lr": rates[kind.removesuffix("_no_decay")],
            }
            for kind, parameters in groups.items()
        ],
        **{"lr": lr, **kwargs},
    )
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """As bitsandbytes recommends for its 8-bit optimizers. A caller with such a class has imported it."""
    manager = sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
