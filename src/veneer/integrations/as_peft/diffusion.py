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

from veneer.wording import warn

from ...adapters import AdapterSet, adapter_modules
from ...errors import VeneerError
from .strict import Before

__all__ = ["add_adapter", "delete_adapters", "load_lora_adapter"]


def load_lora_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter, or hot-swap its tensors.

    Raises:
        VeneerError: The adapter cannot be loaded. The model is unchanged.
    """
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
