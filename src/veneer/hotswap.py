"""Swap the tensors of an adapter in place: its name and its parameter objects stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import base_of, walk
from veneer.config import LoraConfig, PeftConfig
from veneer.errors import AdapterNameError, ConfigError, LoadMismatchError, MergeError, Text
from veneer.files.keys import PREFIX, to_disk
from veneer.files.read import open_adapter
from veneer.files.values import check_values
from veneer.hub import adapter_directory
from veneer.layers import LoraLayer
from veneer.spec import LoraSpec, resolve_all, restate
from veneer.wording import bullets, some, warn

_RANK_AXIS = {
    0: {"lora_A", "lora_embedding_A", "lora_residual_A"},
    1: {"lora_B", "lora_embedding_B", "lora_residual_B"},
}
# Differences in these cannot be expressed by tensors.
_MUST_AGREE = (
    "peft_type use_dora lora_bias bias fan_in_fan_out modules_to_save trainable_token_indices "
    "alora_invocation_tokens"
).split()


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse configurations that differ in more than their tensors.

    Raises:
        ConfigError: Listing the options in which they differ.
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
    """Replace the tensors of `adapter_name` with those of another adapter, in place.

    A smaller rank is padded with zeros, which changes nothing. The strength becomes that of `config`: as the
    layer's scaling, or, after `prepare_model_for_compiled_hotswap`, as a factor of B. If an error is raised,
    nothing has changed.

    Args:
        model: A model with the adapter.
        state_dict: Tensors by their names in the model, which include the adapter's name.
        adapter_name: The adapter whose tensors are replaced.
        config: The configuration of the new tensors.
        parameter_prefix: Not used: Veneer has only "lora_".

    Raises:
        AdapterNameError: The model has no such adapter.
        MergeError: It is merged.
        LoadMismatchError: Names or shapes do not fit.
        AdapterFileError: A tensor contains NaN or infinity, or is not of a floating-point type.
    """
    layers = _swappable_layers(model, [adapter_name])
    old = {key.removeprefix(PREFIX): value for key, value in _parameters(layers, adapter_name).items()}
    new = {key.removeprefix(PREFIX): value for key, value in state_dict.items()}
    wrong = [f"the model has no {key}" for key in sorted(new.keys() - old.keys())]
    wrong += [f"{key} is missing" for key in sorted(old.keys() - new.keys())]
    wrong += [
        f"{key} is {tuple(new[key].shape)}, which does not fit into {tuple(old[key].shape)}"
        for key in sorted(old.keys() & new.keys())
        if not _fits(key, new[key], old[key])
    ]
    if wrong:
        room = any("does not fit into" in line for line in wrong)
        raise LoadMismatchError(
            f"the tensors cannot take the place of {adapter_name!r}: {'; '.join(some(wrong, 6))}"
            + (". For a larger rank, make room: prepare_model_for_compiled_hotswap(…, target_rank=…), or "
               "enable_peft_hotswap(target_rank=…) of transformers, enable_lora_hotswap(…) of diffusers"
               if room else "")
        )  # fmt: skip
    check_values(new, "the tensors")
    paths = {path: layer.specs[adapter_name].path for path, layer in layers.items()}
    resolved = resolve_all(config, adapter_name, dict.fromkeys(paths.values(), ""))
    specs = {path: resolved[base_path] for path, base_path in paths.items()}
    with torch.no_grad():
        for path, layer in layers.items():
            strength = specs[path].scaling if layer.specs[adapter_name].constant_scaling else 1.0
            for name, parameter in _parameters({path: layer}, adapter_name).items():
                value, key = new[name.removeprefix(PREFIX)], name.removeprefix(path)
                scaled = strength if "_B." in key else 1.0
                parameter.zero_()
                # With groups, each group has its own share of the rank.
                groups = int(getattr(layer.geometry(), "groups", 1)) if "_A." in key else 1
                for part, of_group in zip(parameter.chunk(groups), value.chunk(groups), strict=True):
                    place = part[tuple(slice(0, size) for size in of_group.shape)]
                    place.copy_(of_group if scaled == 1.0 else of_group * scaled)
    for path, layer in layers.items():
        before, after = layer.specs[adapter_name], specs[path]
        if not before.constant_scaling:
            same = before.r == after.r
            alpha = after.lora_alpha if same else after.scaling * before.r
            layer.respecify(replace(before, lora_alpha=alpha, use_rslora=same and after.use_rslora))
    _restate(model, adapter_name, layers)


def _swappable_layers(model: nn.Module, names: Iterable[str] | None) -> dict[str, LoraLayer]:
    """The layers that have one of the adapters (None: any); a merged one is refused."""
    layers = {
        path: layer
        for path, layer in walk(model)
        if isinstance(layer, LoraLayer)
        and (layer.held_adapters if names is None else any(n in layer.held_adapters for n in names))
    }
    if not layers:
        what = "no adapter" if names is None else f"no adapter {', '.join(map(repr, names))}"
        raise AdapterNameError(f"this model has {what} to swap")
    if tied := next((path for path, layer in layers.items() if layer.tied_adapter is not None), None):
        raise ConfigError(
            f"{tied} uses the embedding's factors (ensure_weight_tying): it cannot be swapped alone"
        )
    merged = sorted({n for layer in layers.values() for n in layer.merged_adapters})
    if merged:
        raise MergeError(
            f"{', '.join(map(repr, merged))} is merged into the weights: unmerge_adapter() first "
            "(in diffusers unfuse_lora())"
        )
    return layers


def _parameters(layers: Mapping[str, LoraLayer], adapter_name: str) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{key}": parameter
        for path, layer in layers.items()
        for key, parameter in layer.named_parameters()
        if key.startswith("lora_") and adapter_name in key.split(".")
    }


def _fits(key: str, new: Tensor, old: Tensor) -> bool:
    """Whether the shapes are equal, or the new one is smaller along the axis of the rank."""
    if new.ndim != old.ndim:
        return False
    parts = key.split(".")
    rank_axis = next((axis for axis, names in _RANK_AXIS.items() if names & set(parts)), None)
    sizes = enumerate(zip(new.shape, old.shape, strict=True))
    return all(a == b or (axis == rank_axis and a < b) for axis, (a, b) in sizes)


def _restate(model: nn.Module, adapter_name: str, layers: Mapping[str, LoraLayer]) -> None:
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and isinstance(configs.get(adapter_name), LoraConfig):
        restate(configs[adapter_name], [layer.specs[adapter_name] for layer in layers.values()])


def hotswap_adapter(
    model: Any, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the tensors of `adapter_name` with those of an adapter in a directory or on the hub, in place.

    Args:
        model: A `PeftModel` with the adapter.
        model_name_or_path: The directory or repository id of the other adapter.
        adapter_name: The adapter whose tensors are replaced; it keeps its name.
        torch_device: The device to read the tensors to; the CPU by default.
        **kwargs: ``subfolder``, ``revision``, ``token`` and the like.

    Raises:
        ConfigError: The configurations differ in more than their tensors.
        LoadMismatchError: The tensors do not fit; nothing has changed.
    """
    file = open_adapter(adapter_directory(model_name_or_path, **kwargs))
    config = PeftConfig.from_belonging(file.belonging_config())
    if adapter_name not in model.peft_config:
        have = ", ".join(map(repr, model.peft_config)) or "none"
        raise AdapterNameError(f"this model has no adapter {adapter_name!r} to swap; it has: {have}")
    check_hotswap_configs_compatible(model.peft_config[adapter_name], config)
    weights = file.tensors(device=torch_device or "cpu")
    parameters = _parameters(_swappable_layers(model, [adapter_name]), adapter_name)
    names = {to_disk(name, adapter_name): name for name in parameters}
    named = {names.get(key, key): value for key, value in weights.items()}
    hotswap_adapter_from_state_dict(model, named, adapter_name, config)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make room for other adapters, so that swapping them in does not recompile the model.

    Every adapter is padded with zeros to ``target_rank`` and gets a scaling of 1: its strength goes into B,
    which is rounded once more. Its output stays the same. Call this after the first adapter is loaded, before
    `torch.compile` and before an optimizer is created: padded factors are new parameters.

    Args:
        model: A model with adapters.
        target_rank: The largest rank that will be swapped in; None keeps the ranks.
        config: Further configurations to write the new ranks into.
        check_compiled: What to do if the model is already compiled: ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises:
        ConfigError: The model is already compiled, or has adapters of a larger rank.
        AdapterNameError: The model has no adapter.
        MergeError: An adapter is merged.
    """
    _check_compiled(model, check_compiled)
    layers = _swappable_layers(model, None)
    specs = {path: list(layer.specs.values()) for path, layer in layers.items()}
    larger = {
        f"{path} ({s.adapter!r}: {s.r})"
        for path, of_layer in specs.items()
        for s in of_layer
        if target_rank is not None and s.r > target_rank
    }
    if larger:
        listed = ", ".join(sorted(larger)[:3])
        raise ConfigError(f"target_rank={target_rank} is below the rank of {len(larger)} layers: {listed}")
    problems = []
    for path, layer in layers.items():
        for spec in layer.specs.values():
            wide = _widened(spec, target_rank)
            if (reason := layer.refuses(layer.geometry(), wide)) is not None:
                problems.append(Text(f"{path}: ", reason))
            if layer.update(spec.adapter)[1].shape[0] != spec.r and layer.is_matrix():
                problems.append(
                    Text(f"{path}: {spec.adapter!r} keeps its starting factors beside the trained ones")
                )
    if problems:
        raise ConfigError(bullets("these layers cannot be padded:", problems, 6))
    for layer in layers.values():
        for spec in list(layer.specs.values()):
            _pad(layer, spec, target_rank)
    for name in {s.adapter for of_layer in specs.values() for s in of_layer}:
        with_adapter = {p: layer for p, layer in layers.items() if name in layer.held_adapters}
        _restate(model, name, with_adapter)
        other = config.get(name) if isinstance(config, Mapping) else config
        if isinstance(other, LoraConfig):
            restate(other, [layer.specs[name] for layer in with_adapter.values()])


def _check_compiled(model: nn.Module, check_compiled: str) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled is 'error', 'warn' or 'ignore', got {check_compiled!r}")
    compiled = any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in (model, base_of(model))
    )
    if check_compiled != "ignore" and compiled:
        message = "the model is already compiled: prepare it for hot-swapping before torch.compile"
        if check_compiled == "error":
            raise ConfigError(message)
        warn(f"{message}, or it is compiled once more")


def _widened(spec: LoraSpec, target_rank: int | None) -> LoraSpec:
    rank = spec.r if target_rank is None else target_rank
    return replace(spec, r=rank, lora_alpha=float(rank), use_rslora=False, constant_scaling=True)


@torch.no_grad()
def _pad(layer: LoraLayer, spec: LoraSpec, target_rank: int | None) -> None:
    """Pad an adapter of a layer to its new rank, and set its scaling to 1."""
    if spec.constant_scaling and target_rank in (None, spec.r):
        return
    wide = _widened(spec, target_rank)
    a, b, bias = layer.factors(spec.adapter)
    shape_a, shape_b = layer.shapes(layer.geometry(), wide.r)
    strength = layer.scaling[spec.adapter]
    groups = int(getattr(layer.geometry(), "groups", 1))
    new_a, new_b = a.new_zeros(shape_a), b.new_zeros(shape_b)
    for new_part, part in zip(new_a.chunk(groups), a.chunk(groups), strict=True):
        new_part[: part.shape[0]] = part
    new_b[:, : b.shape[1]] = b * strength
    trained = a.requires_grad
    layer.put_factors(spec.adapter, new_a, new_b, None if bias is None else bias * strength)
    layer.respecify(wide)
    trains = set(layer.trained_parameters(spec.adapter)) if trained else set()
    for parameter in layer.adapter_parameters(spec.adapter):
        parameter.requires_grad_(parameter in trains)
