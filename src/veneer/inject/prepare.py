"""Working out and building an adapter beside the model: everything that can fail."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import nn

from veneer import backends, inits, layers, module_names, targets
from veneer.adapters import AdapterModule, AdapterSet, check_adapter_name, walk
from veneer.config import LoraConfig, looks_like_regex
from veneer.errors import Hint, TargetError, Text
from veneer.inject.base_tensors import base_of
from veneer.inject.injection import Addition, Copy, Injection, Rows
from veneer.inject.replication import replication
from veneer.inject.sites import Site, bases, model_type, plan_sites, sharing, sites
from veneer.inject.stacks import names_of_parameters
from veneer.inject.tokens import token_rows
from veneer.inject.tying import followers, tie
from veneer.layers import LoraLayer
from veneer.layers.making import check_config, why_not, with_variant_options
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.parameter import LoraParameter, parameters_of, why_not_wrapped
from veneer.sharded import is_sharded
from veneer.spec import LoraSpec
from veneer.wording import bullets, listed, warn


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
        config: The configuration; not changed.
        adapter_name: The adapter's name.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        strict_targets: Raise where part of the configuration matches nothing.
        stored: For an adapter from a file, the names of its tensors: do not warn of options without an
            effect, and take what another library would have adapted.
        quiet: Do not warn of options without an effect.

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
    own = copy.deepcopy(config)
    change = replication(model, own)
    with nullcontext() if change is None else change.installed():
        additions, copies, tokens = _parts(model, own, adapter_name, strict_targets, stored, quiet)
    return Injection(model, own, adapter_name, additions, copies, tokens, change, autocast_adapter_dtype)


def _parts(
    model: nn.Module,
    config: LoraConfig,
    adapter: str,
    strict: bool,
    stored: Collection[str] | None,
    quiet: bool,
) -> tuple[list[Addition], list[Copy], list[Rows]]:
    """The parts of an adapter for a model that has its final layers; ``config``, our copy, is completed."""
    found = sites(model)
    ties = tie(model, found, config, quiet=quiet)
    named = config.target_parameters
    finished = stored is not None or config.inference_mode  # trained elsewhere, perhaps with what never acts
    chosen = plan_sites(
        model, found, config, adapter, strict=strict, loading=quiet, unread=finished, stored=stored
    )
    if finished:
        _mention_unread(found, chosen.specs)
    specs = [with_variant_options(spec, config) for spec in chosen.specs if spec.path not in ties]
    additions, reasons = _additions(found, specs, config)
    what: list[str | Hint] = ["these modules cannot be adapted as asked"]
    if config.target_parameters != named:
        what += [
            " (",
            Hint("target_modules"),
            " means experts and routers too, as in PEFT: name the other modules",
            Hint("exclude_modules", ["experts", "gate"], clause=", or leave these out with {}"),
            ")",
        ]
    _refuse(Text(*what, ":"), reasons)
    saved = [found[path] for path in chosen.modules_to_save]
    _refuse(
        "these modules cannot be trained whole:", [r for s in saved if (r := _not_to_copy(s)) is not None]
    )
    copies = [_copy_of(site) for site in saved if site.path not in ties]
    layers_of_heads, copies_of_heads = followers(found, additions, copies, ties, config, adapter)
    additions += layers_of_heads
    copies += copies_of_heads
    _complete(config, model, found, additions, copies)
    if not quiet:
        _mention_replaced_bases(additions)
    taken = dict.fromkeys((a.site.path for a in additions), "target_modules")
    taken |= dict.fromkeys((c.site.path for c in copies), "modules_to_save")
    if not config.ensure_weight_tying:
        _mention_uncalled(found, taken)
    return additions, copies, token_rows(model, found, config, taken, stored, quiet=quiet)


def _refuse(what: str | Text, reasons: Sequence[str | Text]) -> None:
    if reasons:
        raise TargetError(bullets(what, reasons))


# --- layers with factors


def _additions(
    found: Mapping[str, Site], specs: Sequence[LoraSpec], config: LoraConfig
) -> tuple[list[Addition], list[str | Text]]:
    """A layer for each spec, new or the one that is there; and all reasons why one cannot be."""
    additions: list[Addition] = []
    reasons: list[str | Text] = []
    by_owner: dict[str, list[LoraSpec]] = {}
    for spec in specs:
        if spec.parameter:
            by_owner.setdefault(spec.path.removesuffix(f".{spec.parameter}"), []).append(spec)
            continue
        site = found[spec.path]
        reason: str | Text | None
        if isinstance(site.module, LoraParameter):
            bare = Hint("target_parameters")
            reason = Text("a parameter of it is adapted (", bare, "): name the module or the parameter")
        else:
            layer = _layer_on(site.module)
            reason = why_not(layer, spec)
        if reason is not None:
            reasons.append(Text(f"{spec.path} ({type(site.base).__name__}): ", reason))
            continue
        additions.append(Addition(site, layer, spec, spec.path, new=layer is not site.module))
        additions += _inside(layer, spec)
    modules = {spec.path for spec in specs if not spec.parameter}
    for owner, own in by_owner.items():
        made, problems = _on_parameters(found[owner], own, owner in modules)
        additions += made
        reasons += problems
    if not reasons and config.bias != "none" and any(a.layer.transparent for a in additions):
        kinds = sorted({type(a.layer.get_base_layer()).__name__ for a in additions if a.layer.transparent})
        reasons.append(
            f"bias={config.bias!r} beside adapters of {', '.join(kinds)}: their biases go by other names, "
            "which readers of adapter files do not agree on; leave bias='none'"
        )
    _name_on_disk(found, additions)
    return additions, reasons


def _layer_on(module: nn.Module) -> LoraLayer:
    """The layer that a module is, or a new one around its base.

    A layer that a deleted adapter tied to another one is not used again.
    """
    if isinstance(module, LoraLayer) and (module.held_adapters or module.tied_adapter is None):
        return module
    base = base_of(module)
    cls = layers.find(base)
    assert cls is not None  # the plan holds supported modules only
    return cls(base)


def _inside(layer: LoraLayer, spec: LoraSpec) -> list[Addition]:
    result = []
    base = layer.get_base_layer()
    for name, times in layer.adapts_inside.items():
        child = base._modules[name]
        assert child is not None
        inner, path = _layer_on(child), f"{spec.path}.{name}"
        own = replace(spec, path=path, owner=spec.path, times=times)
        result.append(Addition(Site(path, child, [(base, name)]), inner, own, path, new=inner is not child))
    return result


def _on_parameters(
    site: Site, specs: Sequence[LoraSpec], whole: bool
) -> tuple[list[Addition], list[str | Text]]:
    """Layers for parameters of one module, each around the one before, in the module's own order.

    Args:
        site: The module.
        specs: Those of its parameters.
        whole: The module itself is to be adapted too.
    """
    kind = type(site.base).__name__
    present = parameters_of(site.module)
    reason: str | Text | None = why_not_wrapped(site.module, [spec.parameter for spec in specs])
    if whole:
        reason = "both it and a parameter of it are named: name one of them"
    if not isinstance(site.module, LoraLayer) and (names := AdapterSet(site.base).names()):
        reason = (
            f"{', '.join(map(repr, names))} adapts modules inside it, whose names in a file would change: "
            "load or add this adapter first"
        )
    if reason is not None:
        return [], [Text(f"{specs[0].path} ({kind}): ", reason)]
    order = list(site.base._parameters)
    additions: list[Addition] = []
    reasons: list[str | Text] = []
    outer = site.module
    for spec in sorted(specs, key=lambda s: order.index(s.parameter)):
        layer = present.get(spec.parameter) or LoraParameter(outer, spec.parameter)
        if (reason := why_not(layer, spec)) is not None:
            reasons.append(Text(f"{spec.path} ({kind}): ", reason))
        additions.append(Addition(site, layer, spec, site.path, new=spec.parameter not in present))
        outer = layer
    return additions, reasons


def _name_on_disk(found: Mapping[str, Site], additions: Sequence[Addition]) -> None:
    """Give every layer its path in the adapted model: one ``base_layer`` for each layer around it."""
    depth = {path: count for path, site in found.items() if (count := _layers_around(site.module))}
    for path in {a.site.path for a in additions if a.layer.transparent}:
        own = [a for a in additions if a.site.path == path]
        depth[path] = len(own)
        for count, addition in enumerate(reversed(own)):
            addition.path = path + ".base_layer" * count
    for addition in additions:
        outer = [path for path in depth if addition.site.path.startswith(f"{path}.")]
        for path in sorted(outer, key=len, reverse=True):
            addition.path = path + ".base_layer" * depth[path] + addition.path.removeprefix(path)


def _layers_around(module: nn.Module) -> int:
    """How many layers lie around a base module whose children are adapted by themselves."""
    if not isinstance(module, LoraLayer) or not module.transparent:
        return 0
    return len(parameters_of(module)) or 1


# --- modules that are trained whole


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
    wrapper = site.module
    reusable = isinstance(wrapper, ModulesToSaveWrapper) and (
        wrapper.held_adapters or not wrapper.tied_adapter
    )
    if not reusable:  # layers that a deleted adapter left behind are not copied
        wrapper = ModulesToSaveWrapper(site.base)
    assert isinstance(wrapper, ModulesToSaveWrapper)
    module = wrapper.new_copy()
    for inner in sites(module).values():
        if isinstance(inner.module, AdapterModule):
            inner.replace(inner.base)
    return Copy(site, wrapper, module)


# --- the completed configuration, and warnings


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
    bare = {a.spec.path for a in additions if a.spec.parameter}
    if bare and config.layers_to_transform:
        config.target_parameters = names_of_parameters(bare, bases(found))
    if config.target_modules is None:
        names = targets.DEFAULT_TARGETS.get(model_type(model) or "", ())
        config.target_modules = names if isinstance(names, str) else set(names)
    elif _only_here(config):
        paths = {a.spec.path for a in additions if a.spec.path in found}
        config.target_modules = module_names.portable_targets(paths, set(found) - paths)
        if config.layers_to_transform is not None:
            config.layers_to_transform = config.layers_pattern = None
    heads = {c.site.path for c in copies if c.follows is None}
    config.modules_to_save = module_names.portable_saved(config.modules_to_save or (), heads, found) or None


def _mention_replaced_bases(additions: list[Addition]) -> None:
    """Warn of adapters whose base changes too where an initialisation gives the layers another weight."""
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
    """Warn of modules of a file's adapter that the model reads without calling them."""
    owners = {spec.path: spec.path.removesuffix(f".{spec.parameter}") for spec in specs}
    readers = {path: cls for path, own in owners.items() if (cls := found[own].reader) is not None}
    if readers:
        warn(
            f"{listed(readers)}: {' and '.join(sorted(set(readers.values())))} reads the weight without "
            "calling the module, so what the adapter has there gets no gradient and has no effect until it "
            "is merged"
        )


def _mention_uncalled(found: Mapping[str, Site], taken: Mapping[str, str]) -> None:
    """Warn of what holds the embedding of an encoder and a decoder, which call modules of their own."""
    for path, field in taken.items():
        own = [other for other in sharing(found, path) if other.endswith(".embed_tokens")]
        if path.rpartition(".")[2] == "shared" and own:
            warn(
                f"{path} ({field}) holds the weight of {listed(own)} and is never called itself, so what an "
                "adapter has there gets no gradient and has no effect: set ",
                Hint("ensure_weight_tying", True),
                ", which trains all of them as one, or name embed_tokens",
            )


def _only_here(config: LoraConfig) -> bool:
    """Whether other readers would not understand the targets: ``all-linear``, or expressions in a list."""
    target = config.target_modules
    if isinstance(target, str):
        return target.lower() == targets.ALL_LINEAR or config.layers_to_transform is not None
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
