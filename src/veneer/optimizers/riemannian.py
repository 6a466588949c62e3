"""Riemannian preconditioning: each factor's gradient is scaled by the inverse Gram matrix of the other."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import ConfigError, TrainingError
from veneer.layers import LoraLayer


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer that steps along ``(BᵀB + reg·I)⁻¹ G_A`` and ``G_B (A Aᵀ + reg·I)⁻¹``.

    G_A and G_B are the gradients of the factors; they are replaced before each step.

    So a step does not depend on how the update is divided between A (r, in) and B (out, r). Everything else
    that is trained gets the plain step: embeddings, convolutions, stacks of experts, biases and vectors.

    Args:
        model: A model with trainable adapters.
        optimizer_cls: The class of the optimizer, such as `torch.optim.AdamW`.
        lr: Learning rate.
        reg: Added to the diagonal, so that the inverse exists where a factor is zero; not negative.
        **kwargs: Options of the optimizer.

    Raises:
        ConfigError: If ``reg`` is negative; if this is no class of an optimizer, or one whose step needs a
            closure, which evaluates the model again within the step.
        TrainingError: If no linear layer has a factor that requires a gradient. Also from ``step`` with a
            closure, which would replace the gradients.

    Source: Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", 2024: the
    preconditioner of scaled GD and scaled AdamW, with their damping.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ConfigError(f"optimizer_cls must be a class of optimizers, got {optimizer_cls!r}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{optimizer_cls.__name__} evaluates the model again within a step (closure), and those "
            "gradients are not preconditioned: choose another optimizer, such as AdamW"
        )
    if not reg >= 0:
        raise ConfigError(f"reg must not be negative, got {reg!r}")
    pairs = [
        (a, b)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        and layer.tied_adapter is None
        and not layer.lookup
        and layer.is_matrix()
        for a, b, _ in map(layer.factors, layer.held_adapters)
        if a.dim() == b.dim() == 2 and (a.requires_grad or b.requires_grad)
    ]
    if not pairs:
        raise TrainingError(
            "no linear layer has a factor that requires a gradient: activate an adapter for training first"
        )

    def precondition(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:2], kwargs.get("closure"))):
            raise TrainingError(
                "step() takes no closure here: it would replace the gradients after they were preconditioned"
            )
        for a, b in pairs:
            left, right = _inverse(b.T, reg), _inverse(a, reg)  # both before either gradient is written
            if a.grad is not None:
                a.grad.copy_(left @ a.grad.to(left.dtype))
            if b.grad is not None:
                b.grad.copy_(b.grad.to(right.dtype) @ right)

    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **{"lr": lr, **kwargs})
    optimizer.register_step_pre_hook(precondition)
    return optimizer


@torch.no_grad()
def _inverse(factor: Tensor, reg: float) -> Tensor:
    """``(F Fᵀ + reg·I)⁻¹``, at least in float32. F: (r, n) -> (r, r)."""
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    gram = wide @ wide.T
    gram.diagonal().add_(reg)
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
    return inverse
