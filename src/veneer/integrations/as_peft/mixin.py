"""Adapter methods of transformers' models that change everything or nothing, and are never silent.

transformers only visits the modules that it knows: it does not enable copies of `modules_to_save` again, and
does not know our trained tokens. Here every module with a part of an adapter is included, a failure leaves
the model unchanged, and a hot swap also changes strength and rank.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ...adapters import AdapterSet, as_names
from ...config import LoraConfig, PeftConfig
from ...errors import ConfigError
from ...files.read import open_adapter
from ...hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict
from ...hub import adapter_directory
from ...lora_model import mention_biases
from . import strict

__all__ = ["add_adapter", "disable_adapters", "enable_adapters", "load_adapter", "set_adapter"]


def load_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter, or hot-swap its tensors if requested.

    Raises:
        LoadMismatchError: Tensors do not fit. The model is as it was before.
        ConfigError: The two adapters of a hot swap cannot be exchanged.
    """
    arguments = inspect.signature(original).bind(model, *args, **kwargs).arguments
    swap = arguments.get("hotswap", "auto")
    if swap == "auto":
        swap = getattr(model, "_hotswap_enabled", False)
    if swap and arguments.get("adapter_name") in getattr(model, "peft_config", {}):
        return _hotswap(model, arguments)
    return strict.load_adapter(original, model, *args, **kwargs)


def _hotswap(model: Any, given: dict[str, Any]) -> Any:
    """Exchange an adapter's tensors and strength in place; returns transformers' report, empty."""
    from transformers.utils.loading_report import LoadStateDictInfo

    from .weights import to_memory

    name, config, tensors = given["adapter_name"], given.get("peft_config"), given.get("adapter_state_dict")
    if (config is None or tensors is None) and given.get("peft_model_id") is None:
        raise ConfigError("a hot swap needs peft_model_id, or both peft_config and adapter_state_dict")
    hub = {**(given.get("adapter_kwargs") or {})}
    if given.get("local_files_only"):
        hub["local_files_only"] = True
    if config is None or tensors is None:
        file = open_adapter(adapter_directory(given["peft_model_id"], **hub))
        config = PeftConfig.from_belonging(file.belonging_config()) if config is None else config
        tensors = file.tensors() if tensors is None else tensors
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"a hot swap needs a LoraConfig, got {type(config).__name__}")
    check_hotswap_configs_compatible(model.peft_config[name], config)
    named = {to_memory(key, name): value for key, value in tensors.items()}
    hotswap_adapter_from_state_dict(model, named, name, config)
    if not given.get("is_trainable", False):
        strict.to_inference(model, name)
    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def add_adapter(
    original: Callable[..., Any], model: Any, adapter_config: Any, adapter_name: Any = None
) -> None:
    """Add a new adapter and activate it; the caller's configuration is not changed.

    Raises:
        ConfigError, TargetError: The model is then as it was before.
    """
    before = model.__dict__.get("_hf_peft_config_loaded", False)
    try:
        original(model, copy.deepcopy(adapter_config), adapter_name)
    except Exception:
        model._hf_peft_config_loaded = before
        raise


def set_adapter(original: Callable[..., Any], model: Any, adapter_name: str | Sequence[str]) -> None:
    """Make these adapters the active ones, in every module that holds a part of one.

    Raises:
        AdapterNameError: For unknown names, and for adapters that cannot be active together. Nothing has
            changed then.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):
        original(model, adapter_name)
        return
    names, adapters = as_names(adapter_name), AdapterSet(model)
    adapters.check(names, known=model.peft_config)
    adapters.activate(names)


def disable_adapters(original: Callable[..., Any], model: Any) -> None:
    """Let the model compute what its base computes."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        original(model)
        return
    mention_biases(model.peft_config)
    AdapterSet(model).enable(False)


def enable_adapters(original: Callable[..., Any], model: Any) -> None:
    original(model)
    AdapterSet(model).enable(True)
