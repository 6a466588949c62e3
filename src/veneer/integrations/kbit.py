"""Preparing a quantised model for training."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer import backends
from veneer.ops.sizes import stored_bytes

logger = logging.getLogger("veneer.kbit")


def model_bytes(model: nn.Module) -> int:
    """Stored bytes of a model's parameters and buffers, including the scales of quantised weights."""
    found: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        found.setdefault(id(tensor), tensor)
    return sum(map(stored_bytes, found.values()))


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: bool = False,
) -> nn.Module:
    """Freeze a quantised model and let gradients pass through it to adapters that are added later.

    The bytes before and after are logged (logger ``veneer.kbit``, level INFO).

    Args:
        model: The model; changed in place. One without quantised modules is frozen only, and upcast if asked.
        use_gradient_checkpointing: Recompute activations in the backward instead of keeping them.
        gradient_checkpointing_kwargs: For `torch.utils.checkpoint.checkpoint`; ``use_reentrant`` is False
            unless given.
        auto_clear_cache: After an upcast, give cached GPU memory back.
        upcast: Convert every 16-bit parameter that is not quantised to float32, including embeddings and
            output head, as PEFT's function of this name does for bitsandbytes. Off by default: it doubles the
            memory of these parameters, and the factors are float32 anyway.

    Returns:
        The same model.
    """
    before = model_bytes(model)
    coded = {name: b for name, m in model.named_modules() if (b := backends.quantised(m)) is not None}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    backends.prepare_backward(model)
    if upcast:
        _upcast(model, set(coded))
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if coded and use_gradient_checkpointing:
        _checkpoint(model, dict(gradient_checkpointing_kwargs or {}))
    logger.info(
        "%d of %d modules are quantised (%s); %.1f MB before, %.1f MB after",
        len(coded),
        sum(1 for _ in model.modules()),
        ", ".join(sorted({str(b.quantization) for b in coded.values()})) or "none",
        before / 1e6,
        model_bytes(model) / 1e6,
    )
    return model


def _upcast(model: nn.Module, coded: set[str]) -> None:
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            stored = path in coded and name == "weight"
            if parameter is not None and not stored and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)


def _checkpoint(model: nn.Module, options: dict[str, Any]) -> None:
    """Turn checkpointing on, under the name that the installed transformers uses."""
    options.setdefault("use_reentrant", False)
    if options["use_reentrant"]:
        # Only then does a checkpoint decide by its inputs alone whether a gradient is needed.
        ask: Any = getattr(model, "enable_input_require_grads", None)
        if callable(ask):
            ask()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad)  # type: ignore[operator]
    newer: Any = getattr(model, "activation_checkpointing_enable", None)
    enable: Callable[..., Any] | None = newer or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        logger.info("%s has no checkpointing to switch on", type(model).__name__)
        return
    accepted = inspect.signature(enable).parameters
    name = next((n for n in accepted if n.endswith("checkpointing_kwargs")), None)
    enable(**({} if name is None else {name: options}))


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
