"""Exchange the tensors of an adapter in place, keeping its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...config import LoraConfig, PeftConfig
from ...errors import AdapterNameError, ConfigError, LoadMismatchError, VeneerError
from ...layers import LoraLayer
from ...spec import resolve

# What the swapped tensors cannot express.
_MUST_AGREE = ("peft_type", "use_dora", "lora_bias", "bias", "fan_in_fan_out", "modules_to_save")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse to swap where the tensors alone do not carry the difference.

    Raises:
        ConfigError: Naming every field that differs and matters.
    """
    differing = [
        f"{name}: {getattr(config0, name, None)!r} and {getattr(config1, name, None)!r}"
        for name in _MUST_AGREE
        if getattr(config0, name, None) != getattr(config1, name, None)
    ]
    if differing:
        raise ConfigError(f"these adapters cannot be swapped for one another: {'; '.join(differing)}")


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Put the tensors of another adapter in the place of `adapter_name`'s, in place.

    A smaller rank is filled up with zeros, which changes nothing; the strength becomes that of `config`.

    Args:
        model: A model with the adapter.
        state_dict: Tensors by their name in the model, adapter name included.
        adapter_name: The adapter whose tensors are exchanged.
        config: The configuration of the new tensors.
        parameter_prefix: Only "lora_" exists here.

    Raises:
        AdapterNameError: The model has no such adapter.
        LoadMismatchError: Names or shapes do not fit. Nothing has changed then.
    """
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.specs
    }
    if not layers:
        raise AdapterNameError(f"this model has no adapter {adapter_name!r} to swap")
    places = {
        f"{path}.{key}": parameter
        for path, layer in layers.items()
        for key, parameter in layer.named_parameters()
        if key.startswith(parameter_prefix) and adapter_name in key.split(".")
    }
    given = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
    own = {key.removeprefix("base_model.model."): place for key, place in places.items()}
    wrong = [f"the model has no {key}" for key in sorted(given.keys() - own.keys())]
    wrong += [f"{key} is not given" for key in sorted(own.keys() - given.keys())]
    wrong += [
        f"{key} is {tuple(given[key].shape)}, which does not fit into {tuple(own[key].shape)}"
        for key in sorted(own.keys() & given.keys())
        if not _fits(given[key], own[key])
    ]
    if wrong:
        raise LoadMismatchError(
            f"the tensors cannot take the place of {adapter_name!r}: {'; '.join(wrong[:6])}"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.zero_()
            parameter[tuple(slice(0, size) for size in given[key].shape)].copy_(given[key])
    for layer in layers.values():
        layer.scaling[adapter_name] = resolve(config, adapter_name, layer.specs[adapter_name].path).scaling


def _fits(new: Tensor, old: Tensor) -> bool:
    """Equal in shape, or smaller along the one axis that is the rank."""
    if new.ndim != old.ndim:
        return False
    differing = [(a, b) for a, b in zip(new.shape, old.shape, strict=True) if a != b]
    return all(a < b for a, b in differing) and len(differing) <= 1


def hotswap_adapter(
    model: Any, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put an adapter from a directory or the hub in the place of `adapter_name`, in place.

    Raises:
        ConfigError: The configurations cannot be exchanged.
        LoadMismatchError: The tensors do not fit.
    """
    from ...model import load_peft_weights
    from .weights import to_memory

    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(model.peft_config[adapter_name], config)
    weights = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    named = {to_memory(key, adapter_name): value for key, value in weights.items()}
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"only LoRA adapters can be swapped, not {config.peft_type}")
    hotswap_adapter_from_state_dict(model, named, adapter_name, config)


def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Not there yet.

    Raises:
        VeneerError: Always; an uncompiled model can be swapped without it, up to the rank that it has.
    """
    raise VeneerError(
        "preparing a model for hot-swapping under torch.compile is not implemented. Without it a swapped "
        "adapter may have at most the rank of the one it replaces, and a compiled model compiles again."
    )
