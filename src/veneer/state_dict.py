"""A model with adapters <-> tensors under the names that they have on disk.

Collecting and filling use one walk over the model, so what is saved is what is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from veneer import sharded
from veneer.adapters import AdapterSet, base_names, base_of, uncompiled, walk
from veneer.backends import stored_elsewhere
from veneer.config import LoraConfig
from veneer.errors import AdapterNameError, CheckpointError, ConfigError, LoadMismatchError, MergeError
from veneer.files.keys import PREFIX, to_disk, without_wrappers
from veneer.files.match import match
from veneer.files.report import LoadReport
from veneer.files.residual import joined, layers_of, parted
from veneer.files.values import check_values
from veneer.inject.base_tensors import bias_parameters, differs_from_base, embedding_weights, merged_over
from veneer.layers import LoraLayer
from veneer.layers.factor import Shared
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.trainable_tokens import TrainableTokens
from veneer.merge import Mergeable
from veneer.wording import listed, some, warn


class Slot(NamedTuple):
    """One tensor of an adapter."""

    disk: str
    memory: str
    tensor: Tensor


def slots(model: nn.Module, adapter: str) -> Iterator[Slot]:
    """Every tensor of an adapter in the model, biases and embeddings of the base apart.

    Args:
        model: A PeftModel, or any module with adapters in it.
        adapter: The adapter's name.
    """
    for path, module in walk(model):
        own: Iterable[tuple[str, Tensor]] = ()
        if isinstance(module, LoraLayer) and adapter in module.held_adapters:
            own = (
                (name, tensor)
                for container in module.adapter_layer_names
                for name, tensor in _container_tensors(module, container, adapter)
            )
        elif isinstance(module, TrainableTokens) and adapter in module.held_adapters:
            keys = module.adapter_state_dict_load_map(adapter).values()
            own = ((name, module.rows(adapter)) for name in keys)
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.held_adapters:
            own = (
                (f"modules_to_save.{adapter}.{name}", tensor)
                for name, tensor in sharded.tensors_of(module.modules_to_save[adapter])
            )
        for name, tensor in own:
            memory = without_wrappers(f"{path}.{name}" if path else name)
            yield Slot(to_disk(memory, adapter), memory, tensor)


def _container_tensors(layer: LoraLayer, container: str, adapter: str) -> Iterator[tuple[str, Tensor]]:
    parts = getattr(layer, container)
    if adapter not in parts:
        return
    value = parts[adapter]
    value = value.weight if isinstance(value, Shared) else value
    if isinstance(value, Tensor):
        yield f"{container}.{adapter}", value
    else:
        for name, tensor in sharded.tensors_of(value):
            yield f"{container}.{adapter}.{name}", tensor


def _root(model: nn.Module) -> tuple[nn.Module, str]:
    inner = getattr(type(model), "get_base_model", None)
    return (model.get_base_model(), PREFIX) if inner is not None else (model, "")  # type: ignore[operator]


def _config(model: nn.Module, adapter: str) -> LoraConfig:
    configs: Mapping[str, LoraConfig] = getattr(model, "peft_config", {})
    if adapter not in configs:
        AdapterSet(model).check([adapter], known=configs)
    return configs[adapter]


def adapter_state_dict(
    model: nn.Module,
    adapter: str,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    gather: bool = False,
) -> dict[str, Tensor]:
    """The tensors of an adapter as they are on disk; only they are ever collected.

    A frozen term is part of factors of twice the rank: see `veneer.files.residual`.

    Args:
        model: A PeftModel, or any module with adapters in it.
        adapter: The adapter's name.
        state_dict: Take the values from this full state dict (gathered from shards) instead of the model.
        save_embedding_layers: Add the input and output embeddings: True, False, or "auto": those that the
            adapter targets, and both if the vocabulary was resized.
        gather: Put tensors that FSDP2 has sharded together; every rank has to call then. What FSDP1 has
            sharded always is.

    Raises:
        AdapterNameError: If the model has no such adapter.
        LoadMismatchError: If ``state_dict`` lacks a tensor of the adapter.
        CheckpointError: FSDP1 keeps the adapter in pieces, and wraps the model from outside.
    """
    sharded.reshard(model)
    wanted = wanted_slots(model, adapter, save_embedding_layers)
    root, prefix = _root(model)
    merged = _before_merging(root, prefix, wanted)
    if state_dict is None:
        elsewhere = stored_elsewhere(model) if any(s.tensor.is_meta for s in wanted.values()) else {}
        put_together = whole_tensors(model, adapter, wanted, save_embedding_layers)
        values = {disk: elsewhere.get(id(slot.tensor), slot.tensor) for disk, slot in wanted.items()}
        values |= put_together
        return _on_disk({disk: merged.get(disk, value).detach() for disk, value in values.items()}, gather)
    renamed = {without_wrappers(name): tensor for name, tensor in state_dict.items()}
    # A state dict of the wrapped model may lack the face's prefix, or already be an adapter's own.
    result, absent = {}, []
    for disk, slot in wanted.items():
        if disk in merged:  # a state dict of this model holds the merged values
            result[disk] = merged[disk].detach()
            continue
        for name in (slot.memory, slot.memory.removeprefix(PREFIX), f"{PREFIX}{slot.memory}", disk):
            if name in renamed:
                result[disk] = renamed[name].detach()
                break
        else:
            if isinstance(slot.tensor, nn.Parameter) or slot.tensor.is_meta or sharded.in_pieces(slot.tensor):
                absent.append(slot.memory)
            else:  # a buffer, which no sharding takes apart: a state dict of parameters alone will do
                result[disk] = slot.tensor.detach()
    if absent:
        raise LoadMismatchError(
            f"the state dict lacks {len(absent)} of the {len(wanted)} tensors of adapter {adapter!r}, "
            f"for example {', '.join(absent[:3])}: was it gathered from all shards?"
        )
    return _on_disk(result, gather)


def saved_together(
    model: nn.Module,
    adapters: Iterable[str],
    state_dict: Mapping[str, Tensor] | None,
) -> bool:
    """Whether saving adapters takes all ranks: to gather pieces from the model, or from its state dict."""
    if state_dict is not None:
        return sharded.takes_all_ranks(model, state_dict.values(), given=True)
    sharded.reshard(model)
    found = (wanted_slots(model, name) for name in adapters)
    tensors = [slot.tensor for slots in found for slot in slots.values()]
    return sharded.takes_all_ranks(model, tensors, given=False)


def wanted_slots(
    model: nn.Module, adapter: str, save_embedding_layers: bool | Literal["auto"] = False
) -> dict[str, Slot]:
    """The tensors of an adapter that are saved, those of the base included, by their name on disk."""
    config = _config(model, adapter)
    wanted = {slot.disk: slot for slot in slots(model, adapter)}
    root, prefix = _root(model)
    of_base = {
        **dict(bias_parameters(root, config.bias, adapter)),
        **_embeddings(root, adapter, save_embedding_layers),
    }
    for name, parameter in of_base.items():
        disk = f"{prefix}{without_wrappers(name)}"
        wanted[disk] = Slot(disk, disk, parameter)
    return wanted


def whole_tensors(
    model: nn.Module,
    adapter: str,
    wanted: Mapping[str, Slot],
    save_embedding_layers: bool | Literal["auto"] = False,
) -> dict[str, Tensor]:
    """Copies of those tensors that FSDP1 keeps in pieces, from all ranks, by name on disk.

    Raises:
        CheckpointError: The module that wraps them is further out than the model, and cannot be seen.
    """
    missing = _pieces(wanted.values(), sharded.whole_storages(model))
    found: dict[str, Tensor] = {}
    if not missing:
        return found
    for whole in sharded.whole_by_unit(model):
        now = wanted_slots(model, adapter, save_embedding_layers)
        still = _pieces(now.values(), whole)
        for disk in [disk for disk in missing if disk not in still]:
            missing.remove(disk)
            found[disk] = now[disk].tensor.detach().clone()
    if missing:
        raise CheckpointError(
            f"FSDP1 keeps {len(missing)} of the {len(wanted)} tensors of adapter {adapter!r} in pieces, and "
            f"this rank sees its own piece alone, perhaps an empty one; for example {missing[0]} as "
            f"{tuple(wanted[missing[0]].tensor.shape)}. To have them whole, {sharded.WAY_OUT}"
        )
    return found


def _pieces(found: Iterable[Slot], whole: Container[int]) -> list[str]:
    return [slot.disk for slot in found if sharded.in_pieces(slot.tensor, whole)]


def _on_disk(tensors: Mapping[str, Tensor], gather: bool) -> dict[str, Tensor]:
    """The tensors with frozen terms joined to the factors, which takes whole ones."""
    if gather or layers_of(tensors):
        tensors = {name: sharded.gathered(tensor) for name, tensor in tensors.items()}
    return joined(tensors)


def _before_merging(root: nn.Module, prefix: str, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Those of the wanted tensors that an adapter is merged into, as they were before, by name on disk."""
    # Not what lies deeper inside a base: other layers' factors.
    of_base = [name for name in wanted if name.rpartition(".")[0].endswith("base_layer")]
    if not of_base:
        return {}
    merged = {
        f"{prefix}{without_wrappers(path)}.": layer
        for path, layer in walk(root)
        if isinstance(layer, LoraLayer | TrainableTokens) and layer.merged
    }
    found: dict[str, Tensor] = {}
    for name in of_base:
        path, _, last = name.rpartition("base_layer.")
        layer = merged.get(path.removesuffix("token_adapter."))
        tensor = None if layer is None else layer.original_base()._parameters.get(last)
        if tensor is not None:
            found[name] = tensor
    return found


def _embeddings(
    root: nn.Module, adapter: str, save_embedding_layers: bool | Literal["auto"]
) -> dict[str, nn.Parameter]:
    weights = embedding_weights(root)
    if save_embedding_layers is True or not weights:
        if save_embedding_layers is True and not weights:
            warn(
                "save_embedding_layers=True, but this model does not say where its embeddings are: none are "
                "saved"
            )
        return weights
    if save_embedding_layers is False:
        return {}
    targeted = {
        path
        for path, module in walk(root)
        if isinstance(module, LoraLayer) and adapter in module.held_adapters
    }
    declared = _declared_vocabulary(root)
    return {
        name: parameter
        for name, parameter in weights.items()
        if name.removesuffix(".base_layer.weight") in targeted
        or (declared is not None and parameter.shape[0] != declared)
    }


def _declared_vocabulary(root: nn.Module) -> int | None:
    """The vocabulary size in the configuration file of the base, if that is a local directory.

    A difference from the model's own means that the embeddings were resized. Saving never asks the hub.
    """
    name = getattr(getattr(root, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    file = Path(name) / "config.json"
    try:
        size = json.loads(file.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):  # not a local directory with a readable configuration
        return None
    return size if isinstance(size, int) else None


@torch.no_grad()
def set_adapter_state_dict(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter: str,
    *,
    ignore_mismatched_sizes: bool = False,
    strict: bool = False,
    check_finite: bool = True,
    where: object = "the state dict",
) -> LoadReport:
    """Write tensors with names on disk into an adapter that the model has already, in place.

    Args:
        model: A PeftModel, or any module with adapters in it.
        tensors: The adapter's tensors by their names on disk.
        adapter: The adapter's name.
        ignore_mismatched_sizes: Pass over tensors of another shape instead of raising.
        strict: Raise also where tensors are missing or left over.
        check_finite: Raise for NaN and infinity; False warns.
        where: What to call the tensors in messages.

    Returns:
        The account of all keys.

    Raises:
        LoadMismatchError: If no tensor fits, or shapes differ. Nothing has been written then.
        CheckpointError: FSDP1 keeps the adapter in pieces, and wraps the model from outside.
    """
    sharded.reshard(model)
    own = {slot.disk for slot in slots(model, adapter)}
    if not own:
        raise AdapterNameError(f"no module of the model holds the adapter {adapter!r}")
    root, prefix = _root(model)
    optional: dict[str, Tensor] = {
        f"{prefix}{without_wrappers(n)}": p for n, p in embedding_weights(root).items()
    }
    carried = any(name in tensors for name in optional)
    wanted = wanted_slots(model, adapter, carried)
    copies = whole_tensors(model, adapter, wanted, carried)
    optional = {name: copies.get(name, place) for name, place in optional.items()}
    places = {disk: copies.get(disk, slot.tensor) for disk, slot in wanted.items() if disk not in optional}
    tensors = parted(tensors, {name: tuple(places[name].shape) for name in own})
    every = {**places, **optional}
    report = match(
        {k: tuple(t.shape) for k, t in every.items()},
        {k: tuple(t.shape) for k, t in tensors.items()},
        optional=optional,
    )
    if strict or not report.renamed or (report.mismatched and not ignore_mismatched_sizes):
        report.raise_for(where)
    check_values({key: tensors[key] for key in report.renamed}, where, check_finite=check_finite)
    merged = [p for p, m in walk(root) if isinstance(m, Mergeable) and adapter in m.merged_adapters]
    if merged:
        raise MergeError(
            f"the adapter {adapter!r} is merged (into {listed(merged, 1)}): "
            "unmerge_adapter() before loading into it"
        )
    beside = {n: k for k, n in report.renamed.items() if n not in own}
    names = {n: n.removeprefix(prefix) for n in beside}
    changed = [n for n, k in beside.items() if n in copies or differs_from_base(root, names[n], tensors[k])]
    if under := [n for n in changed if merged_over(root, names[n])]:
        raise MergeError(f"another adapter is merged into {' and '.join(under)}: unmerge_adapter() first")
    meta: dict[str, Tensor] = {}
    present: dict[str, Tensor] = {}
    for key, name in report.renamed.items():
        if name in beside and name not in changed:
            continue
        (meta if every[name].is_meta else present)[name] = tensors[key]
    made = _materialised(model, adapter, meta) if meta else []
    for name, value in present.items():
        sharded.write_into(every[name], value)
    for module, name, tensor in made:
        setattr(module, name, tensor)
    _write_back(model, adapter, copies, carried)
    return report


def _write_back(model: nn.Module, adapter: str, values: dict[str, Tensor], embeddings: bool) -> None:
    """Write whole tensors into what FSDP1 keeps in pieces."""
    if not values:
        return
    for whole in sharded.whole_by_unit(model, writeback=True):
        now = wanted_slots(model, adapter, embeddings)
        still = _pieces(now.values(), whole)
        for disk in [disk for disk in values if disk not in still]:
            now[disk].tensor.copy_(values.pop(disk))


def _materialised(
    model: nn.Module, adapter: str, values: Mapping[str, Tensor]
) -> list[tuple[nn.Module, str, Tensor]]:
    """Tensors with values for those on the meta device: the module that gets each, and under which name."""
    devices: dict[int, torch.device] = {}
    for _, module in walk(model):
        if isinstance(module, LoraLayer) and adapter in module.held_adapters:
            own = (*module.adapter_parameters(adapter), *(module.residual(adapter) or ()))
            devices.update(dict.fromkeys(map(id, own), module.base_device()))
    made: list[tuple[nn.Module, str, Tensor]] = []
    by_memory = {s.memory: values[s.disk] for s in slots(model, adapter) if s.disk in values}
    for path, module in model.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            value = by_memory.get(without_wrappers(f"{path}.{name}" if path else name))
            if value is not None and tensor.is_meta:
                device = devices.get(id(tensor), value.device)
                new = value.detach().to(device=device, dtype=tensor.dtype, copy=True)
                is_trained = isinstance(tensor, nn.Parameter)
                made.append((module, name, nn.Parameter(new, tensor.requires_grad) if is_trained else new))
    return made


class LoadResult(NamedTuple):
    """Keys that did not find their counterpart, with torch's names for them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter under their names on disk.

    Args:
        model: A PeftModel, or a module with injected adapters.
        state_dict: Take the values from this full state dict.
        adapter_name: The adapter.
        unwrap_compiled: Accepted as in PEFT: a compiled model is always unwrapped.
        save_embedding_layers: See `PeftModel.save_pretrained`.
    """
    check_save_embedding_layers(save_embedding_layers)
    return adapter_state_dict(
        uncompiled(model), adapter_name, state_dict=state_dict, save_embedding_layers=save_embedding_layers
    )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    check_finite: bool = True,
) -> LoadResult:
    """Write tensors with names on disk into an adapter that the model has.

    NaN and infinity are refused, unless ``check_finite=False``, which warns.

    Returns:
        The keys that were missing or unexpected; each kind is warned of too.

    Raises:
        LoadMismatchError: If no tensor fits, or shapes differ. Nothing has been written then.
        AdapterFileError: If a tensor holds NaN or infinity, or a factor is no floating-point number.
        CheckpointError: If it is no mapping of names to tensors.
    """
    _check_tensors("peft_model_state_dict", peft_model_state_dict)
    report = set_adapter_state_dict(
        uncompiled(model),
        peft_model_state_dict,
        adapter_name,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        check_finite=check_finite,
    )
    if not report.ok:
        warn(report.message("the state dict"))
    return LoadResult(list(report.missing), list(report.unexpected))


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's state dict under the names that it has without adapters.

    While adapters are merged, it holds the weights as they were before.

    Args:
        model: A PeftModel, or a module with injected adapters.
    """
    base = base_of(model)
    tensors = base.state_dict()
    found = {}
    for plain, (name, holder, attribute) in base_names(base).items():
        if isinstance(holder, LoraLayer | TrainableTokens) and holder.merged:
            found[plain] = getattr(holder.original_base(), attribute).detach()
        elif name in tensors:
            found[plain] = tensors[name]
    return found


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Write a base model's state dict, with the names it has without adapters, into an adapted model.

    Args:
        model: A PeftModel, or a module with injected adapters.
        state_dict: Tensors by their name.
        strict: Raise for names that are missing or unexpected, before anything is written.

    Returns:
        The names that were missing or unexpected.

    Raises:
        LoadMismatchError: Names do not fit, and ``strict``; or shapes differ. Nothing has been written then.
        MergeError: An adapter is merged into the weights.
        CheckpointError: If it is no mapping of names to tensors.
    """
    _check_tensors("state_dict", state_dict)
    base = base_of(model)
    merged = [p for p, m in walk(base) if isinstance(m, Mergeable) and m.merged]
    if merged:
        raise MergeError(f"adapters are merged into {listed(merged, 1)}: unmerge_adapter() first")
    own = base.state_dict()
    names = {plain: place.name for plain, place in base_names(base).items() if place.name in own}
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unexpected]
    wrong = wrong if strict else []
    for name, tensor in state_dict.items():
        if name in names and own[names[name]].shape != tensor.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, here {tuple(own[names[name]].shape)}")
    if wrong:
        raise LoadMismatchError(f"the base's state dict does not fit: {'; '.join(some(wrong, 6))}")
    base.load_state_dict({names[n]: t for n, t in state_dict.items() if n in names}, strict=False)
    return LoadResult(missing, unexpected)


def _check_tensors(what: str, given: object) -> None:
    odd = [given]
    if isinstance(given, Mapping):
        odd = [value for value in given.values() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(
            f"{what}: a mapping of names to tensors is needed, got {type(odd[0]).__name__}"
            + (" among them" if isinstance(given, Mapping) else "")
        )


def check_save_embedding_layers(value: object) -> None:
    """Refuse what is neither a boolean nor "auto".

    Raises:
        ConfigError: With what was given.
    """
    if not isinstance(value, bool) and value != "auto":
        raise ConfigError(f"save_embedding_layers must be True, False or 'auto', got {value!r}")
