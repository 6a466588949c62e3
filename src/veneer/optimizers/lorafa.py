"""LoRA-FA: A is frozen, and B follows the gradient of the whole weight as closely as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.adapters import AdapterSet
from veneer.errors import ConfigError, Hint
from veneer.layers import LoraLayer
from veneer.wording import bullets, warn

#: Keeps A Aᵀ invertible.
_DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, with the gradient of each B replaced by ``s⁻² · G_B (A Aᵀ)⁻¹``.

    With A frozen, this is the step of B whose effect on the weight, ``s·ΔB A``, is closest to the gradient of
    the weight. Every other parameter gets plain AdamW.

    Args:
        params: Parameters, or groups of them.
        pairs: For the id of each B: the layer and the adapter that it belongs to.
        lr: Learning rate.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        correct_bias: Correct the running means for their start at zero.

    Source: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation", 2023; the projection from Wang et
    al., "LoRA-Pro", 2024, theorem 2.1 with A frozen.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Mapping[int, tuple[LoraLayer, str]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        wrong = [f"{n}={v!r} must not be negative" for n, v in (("lr", lr), ("eps", eps)) if not v >= 0]
        wrong += [f"betas must lie in [0, 1), got {betas!r}"] * any(not 0 <= beta < 1 for beta in betas)
        if wrong:
            raise ConfigError("; ".join(wrong))
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "correct_bias": correct_bias})
        self._pairs = dict(pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self._gradient(parameter), group)
        return loss

    def _gradient(self, parameter: Tensor) -> Tensor:
        grad: Any = parameter.grad
        if id(parameter) not in self._pairs:
            return grad  # type: ignore[no-any-return]
        layer, name = self._pairs[id(parameter)]
        _, a = layer.update(name)
        a = a.to(device=parameter.device, dtype=torch.promote_types(a.dtype, torch.float32))
        gram = a @ a.T
        gram.diagonal().add_(_DAMPING)
        projected: Tensor = grad.flatten(1).to(a) @ torch.linalg.pinv(gram) / layer.scaling[name] ** 2
        return projected.view_as(grad).to(grad)

    def _update(self, parameter: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0.0:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freeze A of the active adapters, and create an optimizer for their other parameters.

    Args:
        model: A model with trainable adapters.
        r: Their rank. Each layer uses its own; there is a warning if no layer has this one.
        lora_alpha: Likewise.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        use_rslora: Not needed; must agree with the adapters' configuration.

    Raises:
        ConfigError: If A of some layer is all zeros (as that of an embedding is before training), so that B
            could learn nothing; if a layer's update is not a product of two matrices; or if ``use_rslora``
            differs from the adapters'.
    """
    active = AdapterSet(model).active()
    owned = [
        (path, module, name)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for name in module.held_adapters
        if name in active
    ]
    _check(owned, r, lora_alpha, use_rslora)
    pairs = {}
    for _, layer, name in owned:
        a, b, _ = layer.factors(name)
        a.requires_grad_(False)
        pairs[id(b)] = (layer, name)
    trained = [p for p in model.parameters() if p.requires_grad]
    return LoraFAOptimizer(trained, pairs, lr=lr, weight_decay=weight_decay)


def _check(
    owned: list[tuple[str, LoraLayer, str]], r: int, lora_alpha: float, use_rslora: bool | None
) -> None:
    if not owned:
        raise ConfigError("LoRA-FA trains adapters, and this model has no active one")
    specs = [layer.specs[name] for _, layer, name in owned]
    wrong = [
        f"{path}: A of {name!r} is all zeros, and frozen it stays so (choose another init_lora_weights, or "
        "leave the layer out)"
        for path, layer, name in owned
        if not bool(layer.factors(name)[0].any())
    ]
    wrong += [
        f"{path}: the update of {name!r} is no product of two matrices (a convolution with groups)"
        for path, layer, name in owned
        if not layer.is_matrix()
    ]
    if use_rslora is not None and (other := {s.adapter for s in specs if s.use_rslora != use_rslora}):
        wrong.append(f"use_rslora={use_rslora}, but {', '.join(map(repr, sorted(other)))} says otherwise")
    if wrong:
        raise ConfigError(bullets("LoRA-FA cannot train this model:", wrong))
    if not any((s.r, s.lora_alpha) == (r, lora_alpha) for s in specs):
        warn(
            "no active adapter has ",
            Hint("r", r),
            " and ",
            Hint("lora_alpha", lora_alpha),
            "; each layer's own values are used",
        )
