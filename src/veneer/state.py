"""A model with adapters <-> tensors under the names that they have on disk.

Collecting and filling use one walk over the model, so what is saved is what is loaded.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from veneer import backends, sharded
from veneer.adapters import AdapterSet, base_names, walk
from veneer.backends import stored_elsewhere
from veneer.config import LoraConfig
from veneer.errors import (
    AdapterNameError,
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    Hint,
    LoadMismatchError,
    MergeError,
    VeneerWarning,
)
from veneer.files.fingerprint import compare_fingerprints, fingerprint
from veneer.files.keys import to_disk
from veneer.files.match import LoadReport, match
from veneer.files.residual import joined, layers_of, parted
from veneer.files.values import check_values
from veneer.inject import Injection, bias_parameters, differs_from_base, embedding_weights, merged_over
from veneer.inject.replication import is_replicated
from veneer.layers import LoraLayer
from veneer.layers.factor import RESIDUAL
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.trainable_tokens import TrainableTokens

#: What a saved adapter's names begin with.
PREFIX = "base_model.model."
#: Key of the base's fingerprint in the metadata of a safetensors file.
FINGERPRINT = "veneer_base"
#: Sizes of an architecture, as transformers' configurations call them.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
#: A path into one of several blocks that are alike.
_BLOCK = re.compile(r"(^|\.)\d+\.")

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _clean(name: str) -> str:
    """A parameter's name without the segments that compilers and shards add."""
    return _WRAPPERS.sub("", name)


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
            memory = _clean(f"{path}.{name}" if path else name)
            yield Slot(to_disk(memory, adapter), memory, tensor)


def _container_tensors(layer: LoraLayer, container: str, adapter: str) -> Iterator[tuple[str, Tensor]]:
    held = getattr(layer, container)
    if adapter not in held:
        return
    value = held[adapter]
    if isinstance(value, Tensor):
        yield f"{container}.{adapter}", value
    else:
        for name, tensor in sharded.tensors_of(value):
            yield f"{container}.{adapter}.{name}", tensor


def _root(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that was adapted, and the prefix under which ``model`` holds it."""
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
    sharded.settle(model)
    wanted = wanted_slots(model, adapter, save_embedding_layers)
    root, prefix = _root(model)
    merged = _before_merging(root, prefix, wanted)
    if state_dict is None:
        elsewhere = stored_elsewhere(model) if any(s.tensor.is_meta for s in wanted.values()) else {}
        put_together = whole_tensors(model, adapter, wanted, save_embedding_layers)
        values = {disk: elsewhere.get(id(slot.tensor), slot.tensor) for disk, slot in wanted.items()}
        values |= put_together
        return _on_disk({disk: merged.get(disk, value).detach() for disk, value in values.items()}, gather)
    given = {_clean(name): tensor for name, tensor in state_dict.items()}
    # A state dict of the wrapped model may lack the face's prefix, or already be an adapter's own.
    result, absent = {}, []
    for disk, slot in wanted.items():
        if disk in merged:  # a state dict of this model holds the merged values
            result[disk] = merged[disk].detach()
            continue
        for name in (slot.memory, slot.memory.removeprefix(PREFIX), f"{PREFIX}{slot.memory}", disk):
            if name in given:
                result[disk] = given[name].detach()
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
    sharded.settle(model)
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
        disk = f"{prefix}{_clean(name)}"
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
        f"{prefix}{_clean(path)}.": layer
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
            warnings.warn(
                "save_embedding_layers=True, but this model does not say where its embeddings are: none are "
                "saved",
                VeneerWarning,
                stacklevel=5,
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


def fill_injection(
    injection: Injection,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[Iterable[str]], Mapping[str, Tensor]],
    *,
    where: object,
    strict: bool = True,
    check_finite: bool = True,
    prefix: str = PREFIX,
) -> LoadReport:
    """Give a prepared adapter the values of a file, after accounting for all of them.

    Args:
        injection: The prepared adapter; the model is not touched.
        shapes: The file's names and shapes.
        read: Reads tensors by their names in the file.
        where: What to call the file in messages.
        strict: Raise unless every tensor of the file is used and every expected one is there.
        check_finite: Raise for NaN and infinity; False warns.
        prefix: What the names begin with.

    Raises:
        LoadMismatchError: With ``strict``; or always when no tensor at all fits.
    """
    optional = {f"{prefix}{k}": v for k, v in injection.optional().items()}
    expected = {f"{prefix}{k}": v for k, v in injection.expected().items()}
    if layers_of(expected):
        held = _with_start(injection, parted(read(list(shapes)), expected), where, prefix)
        shapes, read = (
            {name: tuple(tensor.shape) for name, tensor in held.items()},
            lambda keys: {key: held[key] for key in keys},
        )
    report = match({**expected, **optional}, shapes, optional=optional)
    if strict or not report.renamed:
        report.raise_for(where)
    if report.notice:
        warnings.warn(f"{where}: {report.notice}", VeneerWarning, stacklevel=4)
    values = read(list(report.renamed))
    check_values(values, where, check_finite=check_finite)
    injection.fill({report.renamed[k].removeprefix(prefix): t for k, t in values.items()})
    if changed := injection.changed_embeddings():
        if under := [name for name in changed if merged_over(injection.model, name)]:
            raise MergeError(
                f"{where} carries its own {' and '.join(under)}, into which an adapter is merged here: "
                "unmerge_adapter() before loading it"
            )
        warnings.warn(
            f"{where} carries its own {' and '.join(changed)}: the base's values are replaced by them, "
            "for every adapter on this model",
            VeneerWarning,
            stacklevel=4,
        )
    return report


def _with_start(
    injection: Injection, tensors: Mapping[str, Tensor], where: object, prefix: str
) -> dict[str, Tensor]:
    """The tensors of a file, with the frozen terms that other libraries leave in the base.

    Raises:
        LoadMismatchError: If they cannot be worked out from the base alone.
    """
    result, names = dict(tensors), {}
    for addition in injection.additions:
        path = f"{prefix}{addition.site.path}."
        keys = [f"{path}{part}" for part in RESIDUAL]
        if not any(key in result for key in keys) and any(key.startswith(f"{path}lora_") for key in result):
            names[path] = addition
    if not names:
        return result
    spec = next(iter(names.values())).spec
    init = Hint("init_lora_weights", spec.init)
    try:
        for path, addition in names.items():
            start = addition.layer.initialise(addition.spec, 0)
            assert start.residual is not None
            result.update({f"{path}{part}": t for part, t in zip(RESIDUAL, start.residual, strict=True)})
    except ConfigError as error:
        raise LoadMismatchError(
            f"{where} holds the trained factors of ",
            init,
            " alone, as the peft library saves them: they fit a base from which their start was subtracted, "
            "and that start is not in the file (",
            error.message,
            "). Convert it where it was trained (its save_pretrained takes "
            "path_initial_model_for_weight_conversion), or pass config= with ",
            Hint("init_lora_weights", True),
            " for a base that has its start subtracted already",
        ) from error
    about = "" if spec.init in ("pissa", "olora") else ", up to what its random or measured parts differ"
    warnings.warn(
        VeneerWarning(
            f"{where} holds the trained factors of ",
            init,
            " alone, as the peft library saves them: they fit a base from which their start was subtracted. "
            f"The start was worked out again from this base{about}; it must be the original base",
        ),
        stacklevel=5,
    )
    return result


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
    sharded.settle(model)
    own = {slot.disk for slot in slots(model, adapter)}
    if not own:
        raise AdapterNameError(f"no module of the model holds the adapter {adapter!r}")
    root, prefix = _root(model)
    optional: dict[str, Tensor] = {f"{prefix}{_clean(n)}": p for n, p in embedding_weights(root).items()}
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
    merged = [p for p, m in walk(root) if isinstance(m, LoraLayer) and adapter in m.merged_adapters]
    if merged:
        raise MergeError(
            f"the adapter {adapter!r} is merged (into {merged[0]} and {len(merged) - 1} more): "
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
            value = by_memory.get(_clean(f"{path}.{name}" if path else name))
            if value is not None and tensor.is_meta:
                device = devices.get(id(tensor), value.device)
                new = value.detach().to(device=device, dtype=tensor.dtype, copy=True)
                is_trained = isinstance(tensor, nn.Parameter)
                made.append((module, name, nn.Parameter(new, tensor.requires_grad) if is_trained else new))
    return made


def base_fingerprint(
    model: nn.Module,
    targets: Mapping[str, LoraLayer] | None = None,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What tells the base model of an adapter from another one of the same shape.

    Args:
        model: The base model, adapted or about to be.
        targets: The adapted layers by path; None looks them up.
        others: Samples of weights that are not adapted, of a fingerprint that this one is compared with: the
            same weights are taken here. None takes some of the present model's.
    """
    if targets is None:
        targets = {path: m for path, m in walk(model) if isinstance(m, LoraLayer)}
    weights: dict[str, Tensor | Callable[[], Tensor]] = {}
    storages = set()
    for path, layer in targets.items():
        base = layer.get_base_layer()
        backend = backends.quantised(base)
        weight = getattr(base, layer.weight_name, None)
        if backend is not None and layer.weight_name == "weight":
            storages.add(str(backend.quantization))
            if backend.readable and not layer.merged_for_good:
                weights[_clean(path)] = partial(_original_weight, layer)
        elif isinstance(weight, Tensor):
            unknown = sharded.in_pieces(weight) or layer.merged_for_good  # counted all the same
            weights[_clean(path)] = torch.empty(0, device="meta") if unknown else weight.detach()
            if layer.merged and not unknown and type(weight) in (Tensor, nn.Parameter) and not weight.is_meta:
                weights[_clean(path)] = partial(_original_weight, layer)  # only a few of them are sampled
    config = getattr(model, "config", None)
    found = {
        name: config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        for name in ("vocab_size", *SIZES)
    }
    sizes = {
        name: size for name, size in found.items() if isinstance(size, int) and not isinstance(size, bool)
    }
    size = sizes.pop("vocab_size", None)
    if is_replicated(model):
        sizes.pop("num_hidden_layers", None)
    beside = _other_weights(model, {_clean(path) for path in targets}, others)
    return fingerprint(type(model).__name__, size, weights, storages, others=beside, sizes=sizes)


def _other_weights(
    model: nn.Module, adapted: Container[str], samples: Mapping[str, Any] | None
) -> dict[str, Tensor | Callable[[], Tensor]]:
    """Matrices in the base's repeated blocks: those that are not adapted, or those that ``samples`` names.

    Heads and embeddings are left out: they are made anew for a task, or resized.
    """
    found: dict[str, Tensor | Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, place in base_names(model).items():
        path, _, attribute = name.rpartition(".")
        path = _clean(path)
        if attribute != "weight" or _BLOCK.search(path) is None:
            continue
        if samples is None and (path in adapted or place.holder is not None):
            continue
        layer = place.holder if isinstance(place.holder, LoraLayer) else None
        weight = model.get_submodule(place.name.rpartition(".")[0])._parameters.get("weight")
        if weight is None or weight.dim() < 2:
            continue
        merged = layer is not None and layer.merged and not weight.is_meta
        found[path] = partial(_original_weight, layer) if merged and layer is not None else weight.detach()
        shapes[path] = tuple(weight.shape)
    if samples is None:
        return found
    try:
        wanted = {path: tuple(sample["shape"]) for path, sample in samples.items()}
        return {path: found[path] for path in match(shapes, wanted).renamed.values()}
    except (LookupError, TypeError, AttributeError):  # the comparison says that it is unreadable
        return {}


def _original_weight(layer: LoraLayer) -> Tensor:
    base = layer.original_base()
    return backends.find(base, layer.weight_name).read(base, layer.weight_name)


def check_base(
    model: nn.Module,
    metadata: Mapping[str, str],
    where: object,
    targets: Mapping[str, LoraLayer] | None = None,
    carried: Container[str] = (),
) -> None:
    """Compare the base that an adapter was made on with the one it is about to be put on.

    Args:
        model: The base model, adapted or about to be.
        metadata: That of the adapter's file.
        where: What to call the file in messages.
        targets: The adapted layers by path; None looks them up.
        carried: Names in the adapter's file. Base weights among them (embeddings, resized perhaps) need not
            be those that the adapter was made on: they are replaced.

    Raises:
        BaseMismatchError: If they are plainly different models.
    """
    text = metadata.get(FINGERPRINT)
    if text is None:
        return
    try:
        saved = json.loads(text)
        kept = {k: v for k, v in saved["samples"].items() if f"{PREFIX}{k}.base_layer.weight" not in carried}
        saved = {**saved, "samples": kept}
        others = saved.get("others", {})
    except (ValueError, LookupError, TypeError, AttributeError):  # the comparison says that it is unreadable
        saved = others = {}
    result = compare_fingerprints(saved, base_fingerprint(model, targets, others))
    if result.severity == "none":
        return
    said = "; ".join(result.problems)
    if result.severity == "wrong":
        raise BaseMismatchError(
            f"{where} was made on another base model: {said}. Load the base that its adapter_config.json "
            "names",
            Hint("check_base", False, "; {} loads it all the same"),
        )
    warnings.warn(
        f"{where}: the base model is not exactly the one it was made on: {said}", VeneerWarning, stacklevel=4
    )
