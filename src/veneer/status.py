"""The status of a model's adapters, for each module and for the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from veneer.adapters import AdapterModule, AdapterSet, base_of, walk
from veneer.errors import ConfigError, TargetError
from veneer.layers import LoraLayer

Irregular = Literal["irregular"]
_T = TypeVar("_T")


@dataclass
class TunerLayerStatus:
    """The adapters of one module.

    Attributes:
        name: Path in the base model.
        module_type: Class of the module that holds the adapters.
        enabled: Whether adapters are enabled here.
        active_adapters: Names of the active adapters.
        merged_adapters: Names of the adapters that are merged into the weight.
        requires_grad: Whether the parameters of each adapter are trainable here.
        available_adapters: Names of all adapters of this module.
        devices: Types of the devices that the parameters of each adapter are on.
        quantization_backend: Name of the quantised storage of the base weight, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The adapters of a model; a value on which its modules disagree is ``"irregular"``.

    Attributes:
        base_model_type: Class of the base model.
        adapter_model_type: Class of the model's ``base_model``, ``LoraModel``; ``"None"`` for a torch model.
        peft_types: The method of each adapter.
        trainable_params: Number of trainable parameters.
        total_params: Number of all parameters.
        num_adapter_layers: Number of modules that hold adapters.
        enabled: As in `TunerLayerStatus`, over all modules.
        active_adapters: As in `TunerLayerStatus`, over all modules.
        merged_adapters: As in `TunerLayerStatus`, over all modules.
        requires_grad: As in `TunerLayerStatus`, over all modules.
        available_adapters: As in `TunerLayerStatus`, over all modules.
        devices: As in `TunerLayerStatus`, over all modules.
        quantization_backend: As in `TunerLayerStatus`, over all modules.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every module that holds adapters, in model order.

    Args:
        model: A `PeftModel`, or any model that adapters were injected into.

    Raises:
        TargetError: The model holds no adapter.
    """
    found = [
        _layer_status(path, module)
        for path, module in walk(base_of(model))
        if isinstance(module, AdapterModule) and module.held_adapters
    ]
    if not found:
        raise TargetError(
            "this model holds no adapter: add one with get_peft_model, inject_adapter_in_model or "
            "load_adapter"
        )
    return found


def _layer_status(path: str, module: AdapterModule) -> TunerLayerStatus:
    parameters = {name: list(module.adapter_parameters(name)) for name in module.held_adapters}
    storage = module.backend.quantization if isinstance(module, LoraLayer) else None
    return TunerLayerStatus(
        name=path,
        module_type=type(module).__name__,
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=module.merged_adapters,
        requires_grad={
            name: _agreed(p.requires_grad for p in module.trained_parameters(name))
            for name, own in parameters.items()
            if own
        },
        available_adapters=sorted(parameters),
        devices={name: sorted({p.device.type for p in own}) for name, own in parameters.items()},
        quantization_backend=storage,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of all adapters of a model.

    Args:
        model: A `PeftModel`, or any model that adapters were injected into.

    Raises:
        TargetError: The model holds no adapter.
    """
    layers = get_layer_status(model)
    tuner = getattr(model, "base_model", None) if hasattr(model, "get_base_model") else None
    trainable, total = count_parameters(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    grads = {
        name: _agreed(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
        for name in names
    }
    devices = {name: sorted({d for layer in layers for d in layer.devices.get(name, ())}) for name in names}
    return TunerModelStatus(
        base_model_type=type(base_of(model)).__name__,
        adapter_model_type="None" if tuner is None else type(tuner).__name__,
        peft_types=_methods(model),
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_agreed(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad=grads,
        available_adapters=names,
        devices=devices,
        quantization_backend=_agreed(layer.quantization_backend for layer in layers),
    )


@dataclass(frozen=True)
class AdapterState:
    """One adapter of a model, over all modules that hold it.

    Attributes:
        ranks: Its ranks, ascending; empty if it only trains modules in full.
        modules: Number of modules that hold it.
        parameters: Number of its parameters.
        states: What it is: ``active``, ``merged``, ``trainable``, ``disabled``; with ``in part`` behind where
            modules disagree.
    """

    ranks: tuple[int, ...]
    modules: int
    parameters: int
    states: tuple[str, ...]


class AdapterStates(dict[str, AdapterState]):
    """The adapters of a model by name, as they are now; ``repr`` shows them as a table."""

    def __repr__(self) -> str:
        rows = [("adapter", "rank", "modules", "parameters", "")]
        for name, state in self.items():
            ranks = ", ".join(map(str, state.ranks))
            rows.append((name, ranks, str(state.modules), f"{state.parameters:,}", ", ".join(state.states)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(
                cell.rjust(width) if 0 < column < 4 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
        return "\n".join(lines) if self else "no adapters"


def adapter_states(model: nn.Module) -> AdapterStates:
    """The adapters of a model and what each of them is: active, merged, trainable.

    Args:
        model: A `PeftModel`, or any model that adapters were injected into.
    """
    held: dict[str, list[AdapterModule]] = {}
    for module in AdapterSet(base_of(model)).modules():
        for name in module.held_adapters:
            held.setdefault(name, []).append(module)
    return AdapterStates({name: _state(name, modules) for name, modules in held.items()})


def _state(name: str, modules: Sequence[AdapterModule]) -> AdapterState:
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    parameters = {id(p): p for module in modules for p in module.adapter_parameters(name)}
    facts = {
        "active": [name in module.active_adapters for module in modules],
        "merged": [name in layer.merged_adapters for layer in layers],
        "trainable": [p.requires_grad for module in modules for p in module.trained_parameters(name)],
        "disabled": [module.disable_adapters for module in modules],
    }
    words = [word if all(found) else f"{word} in part" for word, found in facts.items() if any(found)]
    return AdapterState(
        tuple(sorted({layer.specs[name].r for layer in layers})),
        len(modules),
        sum(parameter.numel() for parameter in parameters.values()),
        tuple(words),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters; packed 4-bit weights count each of their values."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _methods(model: nn.Module) -> dict[str, str]:
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {name: "LORA" for name in AdapterSet(model).names()}
    return {name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()}


def _merged(layers: Sequence[TunerLayerStatus]) -> list[str] | Irregular:
    """The merged adapters, if each of them is merged in all modules that can merge it."""
    merged = {name for layer in layers for name in layer.merged_adapters}
    for layer in layers:
        if layer.module_type != "ModulesToSaveWrapper" and (
            merged & set(layer.available_adapters) - set(layer.merged_adapters)
        ):
            return "irregular"
    return sorted(merged)


def _agreed(values: Iterable[_T]) -> _T | Irregular:
    first, *others = values
    return first if all(value == first for value in others) else "irregular"


@torch.no_grad()
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to ``dtype`` and trainable ones to float32, for mixed-precision training.

    Only floating-point parameters are cast: a quantised weight stays as it is.

    Args:
        model: The model, changed in place; the parameters stay the same objects.
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Raises:
        ConfigError: If it is no floating-point type; nothing has changed then.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating-point type such as torch.bfloat16, got {dtype!r}")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.to(torch.float32 if parameter.requires_grad else dtype)
