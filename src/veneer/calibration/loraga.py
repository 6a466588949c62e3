"""Gradients of base weights, for LoRA-GA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from veneer.calibration.measuring import cached, options, planned
from veneer.config import LoraConfig, LoraGAConfig
from veneer.errors import ConfigError, TargetError
from veneer.forward import in_mode
from veneer.inits import note_statistics
from veneer.inject.injection import Addition
from veneer.wording import bullets


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], None],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Measure the gradients of ``init_lora_weights="lora_ga"`` for the next `get_peft_model` on this model.

    Meanwhile only the weights that will be adapted get gradients. Afterwards the model is as it was,
    including ``requires_grad``, its gradients and its mode.

    Args:
        model: The base model. Unless gradients are read from a file, it must be neither quantised nor
            offloaded.
        lora_config: Configuration of the adapter.
        train_step: Runs forward and backward on samples, once or several times; the gradients are averaged
            over the backward passes.
        cache_file: Gradients are read from it if it exists, and written to it if not. So a quantised or
            offloaded model can start from gradients of its 16-bit weights.

    Raises:
        ConfigError: If a layer got no gradient, or the file does not match the model.
        TargetError: If a layer cannot start this way.
    """
    options(lora_config, "lora_ga", LoraGAConfig)
    additions = planned(model, lora_config)
    keys = {path: f"{path}._peft_loraga_grad" for path in additions}

    def measure() -> dict[str, Tensor]:
        _check_weights(additions)
        return {keys[path]: gradient for path, gradient in _gradients(model, additions, train_step).items()}

    found = cached(cache_file, list(keys.values()), measure)
    for path, addition in additions.items():
        gradient = addition.layer.to_matrix(found[keys[path]])
        note_statistics(addition.layer.get_base_layer(), gradient, addition.layer.weight_name)


def _weight(addition: Addition) -> Tensor:
    return getattr(addition.layer.get_base_layer(), addition.layer.weight_name)  # type: ignore[no-any-return]


def _check_weights(additions: Mapping[str, Addition]) -> None:
    """Refuse weights that cannot have a gradient.

    Raises:
        TargetError: Listing them.
    """
    refused = [
        f"{path} ({type(a.site.base).__name__}): its weight is "
        + ("quantised" if a.layer.backend.quantization is not None else "on the meta device or offloaded")
        for path, a in additions.items()
        if a.layer.backend.quantization is not None or _weight(a).is_meta
    ]
    if refused:
        raise TargetError(
            bullets("LoRA-GA needs gradients of the base weights themselves:", refused),
            "\nMeasure the model with its weights in 16 bits and in memory, with a cache_file; then pass "
            "that file here",
        )


@contextmanager
def _only_trainable(model: nn.Module, weights: set[int]) -> Iterator[None]:
    """In this context only these parameters require gradients, and all gradients start empty."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in weights)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _gradients(
    model: nn.Module, additions: Mapping[str, Addition], train_step: Callable[[], None]
) -> dict[str, Tensor]:
    weights = {path: _weight(a) for path, a in additions.items()}
    counts: dict[str, int] = dict.fromkeys(weights, 0)

    def counting(path: str) -> Callable[[Tensor], None]:
        def count(_: Tensor) -> None:
            counts[path] += 1

        return count

    with _only_trainable(model, {id(w) for w in weights.values()}), in_mode(model, True), torch.enable_grad():
        handles = [
            w.register_post_accumulate_grad_hook(counting(path))  # type: ignore[no-untyped-call]
            for path, w in weights.items()
        ]
        try:
            train_step()
        finally:
            for handle in handles:
                handle.remove()
        result = {path: w.grad.detach().clone() for path, w in weights.items() if w.grad is not None}
    if missing := [path for path in weights if path not in result]:
        raise ConfigError(
            f"train_step gave no gradient to {len(missing)} of {len(weights)} layers, for example "
            f"{', '.join(missing[:3])}: it must run the model and call backward() on a loss, and leave the "
            "gradients (no zero_grad at its end)"
        )
    if broken := [path for path, g in result.items() if not bool(g.isfinite().all())]:
        raise ConfigError(f"the gradients of {', '.join(broken[:3])} are not finite")
    return {path: gradient / max(1, counts[path]) for path, gradient in result.items()}
