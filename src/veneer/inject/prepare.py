"""Working out and building an adapter beside the model: everything that can fail."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from veneer import backends, inits, targets
from veneer.adapters import AdapterModule, AdapterSet, check_adapter_name, walk
from veneer.config import LoraConfig, looks_like_regex
from veneer.errors import Hint, TargetError, Text
from veneer.inject.building import build
from veneer.inject.injection import Addition, Copy, Injection
from veneer.inject.replication import planning, replication
from veneer.inject.sites import Site, model_type, plan_sites, sites
from veneer.inject.tokens import token_rows
from veneer.inject.tying import check_tied, tie, tied_additions, tied_copies
from veneer.layers.making import check_config, with_variant_options
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.sharded import is_sharded
from veneer.spec import LoraSpec
from veneer.wording import listed, some, warn


def prepare(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    *,
    autocast_adapter_dtype: bool = True,
    strict_targets: bool = False,
    stored: Collection[str] | None = None,
    quiet: bool = False,
) -> Injection:
    """Work out and build an adapter beside the model, without touching it.

    Args:
        model: The model.
        config: What is asked for; not changed.
        adapter_name: The adapter's name.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        strict_targets: Raise where part of the configuration matches nothing.
        stored: For an adapter from a file, the names of its tensors: say nothing of options without an
            effect, and take what another library would have adapted.
        quiet: Say nothing of options without an effect.

    Raises:
        ConfigError: If an option cannot be honoured.
        AdapterNameError: If the name is taken or unusable.
        TargetError: If nothing matches, or what matches cannot be adapted; all reasons at once.
    """
    check_adapter_name(adapter_name, AdapterSet(model))
    check_config(config)
    _refuse_foreign_layers(model)
    quiet = quiet or stored is not None
    if not quiet:
        for sentence in config._advice():
            warn(sentence)
    if not config.inference_mode and is_sharded(model):
        warn(
            f"the model's parameters are sharded, and those of the new adapter {adapter_name!r} will be "
            "whole on every rank: nobody averages their gradients. Add adapters before FSDP (or average "
            "yourself, as transformers' Trainer does for a model that was sharded when it was loaded)"
        )
    own_config = copy.deepcopy(config)
    change = replication(model, own_config)
    with planning(change):
        injection = _built(model, own_config, adapter_name, strict_targets, stored, quiet)
    injection.change, injection.autocast_adapter_dtype = change, autocast_adapter_dtype
    return injection


def _built(
    model: nn.Module,
    own_config: LoraConfig,
    adapter_name: str,
    strict_targets: bool,
    stored: Collection[str] | None,
    quiet: bool,
) -> Injection:
    """The parts of an adapter for a model that has its final layers."""
    found = sites(model)
    ties = tie(model, found, own_config, quiet=quiet)
    given = stored is not None or own_config.inference_mode  # made elsewhere, perhaps with what never acts
    chosen = plan_sites(
        model,
        found,
        own_config,
        adapter_name,
        strict=strict_targets,
        loading=quiet,
        unread=given,
        stored=stored,
    )
    if given:
        _mention_unread(found, chosen.specs)
    specs = [with_variant_options(spec, own_config) for spec in chosen.specs if spec.path not in ties]
    additions, reasons = build(model, found, specs, own_config)
    if reasons:
        raise TargetError(Text.join("\n  - ", ["these modules cannot be adapted as asked:", *some(reasons)]))
    if reasons := [r for path in chosen.modules_to_save if (r := _not_to_copy(found[path])) is not None]:
        raise TargetError("\n  - ".join(["these modules cannot be trained whole:", *some(reasons)]))
    copies = [_copy_of(found[path]) for path in chosen.modules_to_save if path not in ties]
    check_tied(found, additions, copies, ties)
    additions += tied_additions(found, additions, ties, own_config, adapter_name)
    copies += tied_copies(found, copies, ties)
    _complete(own_config, model, found, additions, copies)
    if not quiet:
        _mention_replaced_bases(additions)
    taken = dict.fromkeys((a.site.path for a in additions), "target_modules")
    taken |= dict.fromkeys((c.site.path for c in copies), "modules_to_save")
    tokens = token_rows(model, found, own_config, taken, stored, quiet=quiet)
    return Injection(model, own_config, adapter_name, chosen, additions, copies, tokens)


def _not_to_copy(site: Site) -> str | None:
    """Why a module cannot be trained whole: a copy of it would hold other adapters' factors."""
    if isinstance(site.module, ModulesToSaveWrapper):
        return None
    coded = [(path, b) for path, m in site.base.named_modules() if (b := backends.quantised(m)) is not None]
    if coded:
        path, backend = coded[0]
        return (
            f"{'.'.join(filter(None, (site.path, path)))}: its weight is quantised ({backend.quantization}), "
            "and codes cannot be trained; target it with LoRA, or load the base with this module left dense "
            "(llm_int8_skip_modules, modules_to_not_convert)"
        )
    names = AdapterSet(site.module).names()
    if not names:
        return None
    return (
        f"{site.path} ({type(site.base).__name__}): {', '.join(map(repr, names))} adapts it or a part of it; "
        "unload() first, or leave it out of modules_to_save"
    )


def _copy_of(site: Site) -> Copy:
    wrapper = (
        site.module if isinstance(site.module, ModulesToSaveWrapper) else ModulesToSaveWrapper(site.module)
    )
    return Copy(site, wrapper, wrapper.new_copy())


def _complete(
    config: LoraConfig,
    model: nn.Module,
    found: Mapping[str, Site],
    additions: list[Addition],
    copies: list[Copy],
) -> None:
    """Write into our copy of the configuration what the model decided."""
    if any(a.layer.transposed and a.layer.linear for a in additions):
        config.fan_in_fan_out = True
    elif config.fan_in_fan_out:
        warn("fan_in_fan_out=True, but no adapted layer stores its weight (in, out): it is ignored")
        config.fan_in_fan_out = False
    if config.target_modules is None:
        names = targets.DEFAULT_TARGETS.get(model_type(model) or "", ())
        config.target_modules = names if isinstance(names, str) else set(names)
    elif _only_here(config):
        paths = {a.spec.path for a in additions if a.spec.path in found}
        config.target_modules = targets.portable_targets(paths, set(found) - paths)
        if config.layers_to_transform is not None:
            config.layers_to_transform = config.layers_pattern = None
    heads = {c.site.path for c in copies if c.follows is None}
    config.modules_to_save = targets.portable_saved(config.modules_to_save or (), heads, found) or None


def _mention_replaced_bases(additions: list[Addition]) -> None:
    """Say whose base changes too where an initialisation gives the layers another weight."""
    others = {
        name for a in additions if inits.find(a.spec.init).replaces_base for name in a.layer.held_adapters
    }
    if others:
        warn(
            Hint("init_lora_weights", additions[0].spec.init),
            f" replaces base weights, and the adapters {', '.join(map(repr, sorted(others)))} work on "
            "the same ones: their outputs change",
        )


def _mention_unread(found: Mapping[str, Site], specs: Sequence[LoraSpec]) -> None:
    """Say which modules of a file's adapter the model reads without calling them."""
    owners = {spec.path: spec.path.removesuffix(f".{spec.parameter}") for spec in specs}
    readers = {path: cls for path, own in owners.items() if (cls := found[own].reader) is not None}
    if readers:
        warn(
            f"{listed(readers)}: {' and '.join(sorted(set(readers.values())))} reads the weight without "
            "calling the module, so what the adapter has there gets no gradient and has no effect until it "
            "is merged"
        )


def _only_here(config: LoraConfig) -> bool:
    """Whether other readers would not understand the targets: ``all-linear``, or expressions in a list."""
    target = config.target_modules
    if isinstance(target, str):
        return target.lower() == "all-linear" or config.layers_to_transform is not None
    return any(looks_like_regex(pattern) for pattern in target or ())


def _refuse_foreign_layers(model: nn.Module) -> None:
    """Wrapping another library's adapted layers, or a whole PeftModel, would nest adapters silently."""
    for path, module in walk(model):
        if isinstance(module, AdapterModule):
            continue
        if type(module).__module__.partition(".")[0] == "peft":
            raise TargetError(
                f"the model already holds layers of the peft library (at {path or 'its root'}): "
                "merge or unload them there first, or load their adapter here with PeftModel.from_pretrained"
            )
        if path == "" and hasattr(module, "merge_and_unload"):
            raise TargetError(
                "the model is a PeftModel already: use model.add_adapter(name, config) for another adapter, "
                "or model.get_base_model() / model.unload() to start anew"
            )
