"""Adapter methods of diffusers' models that leave the model unchanged if they fail, and say why.

After a failure diffusers itself deletes the adapter that it was loading (in a hot swap, the old one), leaves
none active, and raises another error if the adapter was never added.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from veneer.wording import bullets, warn

from ...adapters import AdapterSet, adapter_modules, walk
from ...errors import TargetError, VeneerError
from ...layers.linear import LoraLinear
from .strict import Before

__all__ = ["add_adapter", "delete_adapters", "load_lora_adapter", "load_lora_weights"]


def load_lora_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter, or hot-swap its tensors.

    Raises:
        VeneerError: The adapter cannot be loaded. The model is unchanged.
    """
    _refuse_widened(model)
    arguments = inspect.signature(original).bind(model, *args, **kwargs).arguments
    swap = arguments.get("hotswap", False)
    before = Before(model, "" if swap else arguments.get("kwargs", {}).get("adapter_name") or "")
    try:
        with _nothing_deleted(model) if swap else nullcontext():
            return original(model, *args, **kwargs)
    except Exception as error:
        before.restore()
        cause = error.__context__
        if isinstance(error, KeyError) and isinstance(cause, VeneerError):
            raise cause from None
        raise


def _refuse_widened(model: nn.Module) -> None:
    """Refuse to go on where diffusers has given an adapted layer a wider base (Flux Control)."""
    problems = [
        f"{path}: from {a.shape[1]} inputs, which {name!r} takes, to {layer.in_features}"
        for path, layer in walk(model)
        if isinstance(layer, LoraLinear)
        for name in layer.held_adapters
        if (a := layer.factors(name)[0]).shape[1] != layer.in_features
    ]
    if problems:
        raise TargetError(
            bullets("this adapter widens layers beside adapters that are made for them:", problems),
            "\nunload_lora_weights(), and load this one first: diffusers pads those that come after it",
        )


def load_lora_weights(original: Callable[..., Any], pipeline: Any, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter into a Flux pipeline, whose layers diffusers may widen for it.

    Raises:
        VeneerError: The adapter cannot be loaded. The layers are as wide as before.
    """
    name = "transformer" if hasattr(pipeline, "transformer") else pipeline.transformer_name
    model = getattr(pipeline, name)
    linears = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if isinstance(child, nn.Linear)
    ]
    replaced, channels = getattr(model, "_overwritten_params", None), model.config.in_channels
    try:
        return original(pipeline, *args, **kwargs)
    except Exception:
        for parent, key, child in linears:
            if isinstance(parent._modules.get(key), nn.Linear):
                parent._modules[key] = child
        model._overwritten_params = replaced
        model.config.in_channels = channels
        raise


@contextmanager
def _nothing_deleted(model: nn.Module) -> Iterator[None]:
    """In this context layers do not delete adapters."""
    modules = adapter_modules(model)
    for module in modules:
        module.__dict__["delete_adapter"] = lambda name: None
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["delete_adapter"]


def add_adapter(
    original: Callable[..., Any], model: Any, adapter_config: Any, *args: Any, **kwargs: Any
) -> None:
    """Add a new adapter and activate it; the caller's configuration is not changed.

    Raises:
        ConfigError, TargetError: The model is then as it was before.
    """
    before = Before(model, "")
    try:
        original(model, copy.deepcopy(adapter_config), *args, **kwargs)
    except Exception:
        before.restore()
        raise


def delete_adapters(original: Callable[..., Any], model: Any, adapter_names: str | Sequence[str]) -> None:
    """Delete adapters; warn if other adapters remain and none of them is active."""
    adapters = AdapterSet(model)
    active = adapters.active()
    original(model, adapter_names)
    rest = list(getattr(model, "peft_config", {}))
    if active and rest and not adapters.active():
        warn(
            f"{', '.join(map(repr, active))} was active and is deleted: no adapter of this "
            f"{type(model).__name__} is active now. Choose with set_adapters: {', '.join(map(repr, rest))}"
        )
