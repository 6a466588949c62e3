"""Plan -> wrapped model, all or nothing; and back.

Everything that can fail happens in `prepare`, which leaves the model as it is. `Injection.commit`
then only puts finished modules in their places.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer import backends, inits, layers, targets
from veneer.adapters import AdapterModule, AdapterSet, check_adapter_name
from veneer.config import LoraConfig, looks_like_regex
from veneer.errors import AdapterNameError, TargetError, VeneerError, VeneerWarning
from veneer.inits import InitResult
from veneer.layers import LoraLayer
from veneer.layers.making import check_config, draw_seed, factor_dtype, why_not
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.spec import LoraSpec
from veneer.targets import Candidate, Plan

#: Where torch's transformer encoder keeps, while it holds adapters, whether it packs padded batches.
_NESTED = "_use_nested_tensor_without_adapters"


@dataclass
class Site:
    """A module and every place of the model that refers to it."""

    path: str
    module: nn.Module
    places: list[tuple[nn.Module, str]]

    @property
    def base(self) -> nn.Module:
        """The module that the model was built with."""
        if isinstance(self.module, LoraLayer):
            return self.module.base_layer
        if isinstance(self.module, ModulesToSaveWrapper):
            return self.module.original_module
        return self.module

    def replace(self, module: nn.Module) -> None:
        """Put another module in all the places."""
        for parent, name in self.places:
            parent._modules[name] = module


def sites(model: nn.Module) -> dict[str, Site]:
    """Every module of the model by its path, with adapted ones standing for what they adapt."""
    found: dict[int, Site] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if child is None:
                continue
            site = found.get(id(child))
            if site is not None:
                site.places.append((module, name))
                continue
            path = f"{prefix}{name}"
            found[id(child)] = Site(path, child, [(module, name)])
            if not isinstance(child, AdapterModule):
                visit(child, f"{path}.")

    visit(model, "")
    return {site.path: site for site in found.values()}


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        head = getter()
    except (NotImplementedError, AttributeError):  # models without one
        return None
    return head if isinstance(head, nn.Module) else None


def _is_router(path: str, parent: nn.Module) -> bool:
    """A linear that chooses experts: named so beside a list of experts, or inside a router."""
    name = path.rpartition(".")[2]
    if "router" in path.lower() or "Router" in type(parent).__name__:
        return True
    return "gate" in name and any("expert" in sibling for sibling in parent._modules if sibling != name)


def candidates(model: nn.Module, found: Mapping[str, Site]) -> list[Candidate]:
    """What `targets.plan` needs to know of each module."""
    head = _output_head(model)
    result = []
    for path, site in found.items():
        base, parent = site.base, site.places[0][0]
        cls = layers.find(base)
        reason = layers.refusal(base) or ""
        if isinstance(parent, nn.MultiheadAttention):
            reason = (
                "nn.MultiheadAttention reads this module's weight without calling it: a branch would "
                "never run"
            )
        supported = cls is not None and not reason and not isinstance(site.module, ModulesToSaveWrapper)
        result.append(
            Candidate(
                path=path,
                type_name=type(base).__name__,
                supported=supported,
                linear=cls is not None and cls.linear,
                output_head=base is head or site.module is head,
                router=cls is not None and cls.linear and _is_router(path, parent),
                reason=reason,
            )
        )
    return result


def model_type(model: nn.Module) -> str | None:
    """Transformers' name of the architecture, if the model has one."""
    config = getattr(model, "config", None)
    value = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return value if isinstance(value, str) else None


def plan(
    model: nn.Module, config: LoraConfig, adapter_name: str = "default", *, strict_targets: bool = False
) -> Plan:
    """A dry run: what ``config`` would adapt in ``model``, and what it would not.

    Args:
        model: Any module; it may be on the meta device.
        config: The configuration.
        adapter_name: Name that the adapter would get.
        strict_targets: Raise instead of warning when part of the configuration matches nothing.

    Returns:
        The plan; ``print(plan)`` shows a table.

    Raises:
        TargetError: If nothing matched, a named module cannot be adapted, or ``strict_targets`` found fault.
    """
    inner = getattr(model, "get_base_model", None)
    root: nn.Module = inner() if callable(inner) and AdapterSet(model).modules() else model
    return _plan(root, sites(root), config, adapter_name, strict=strict_targets)


def _plan(
    model: nn.Module,
    found: Mapping[str, Site],
    config: LoraConfig,
    adapter_name: str,
    *,
    strict: bool = False,
    loading: bool = False,
) -> Plan:
    return targets.plan(
        candidates(model, found),
        config,
        adapter_name,
        model_type=model_type(model),
        strict_targets=strict,
        loading=loading,
    )


@dataclass
class Addition:
    """One layer that will get factors."""

    site: Site
    layer: LoraLayer
    spec: LoraSpec
    start: InitResult | None = None

    def keys(self) -> dict[str, tuple[int, ...]]:
        """Names on disk of its factors, under the module's path, with their shapes."""
        shape_a, shape_b = self.layer.shapes(self.layer.original_base(), self.spec.r)
        name_a, name_b = self.layer.factor_names
        suffix = "" if self.layer.lookup else ".weight"
        path = self.site.path
        result = {f"{path}.{name_a}{suffix}": shape_a, f"{path}.{name_b}{suffix}": shape_b}
        if self.spec.lora_bias:
            result[f"{path}.{name_b}.bias"] = shape_b[:1]
        return result

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the factors from tensors with the names of `keys`; absent ones are drawn as zero."""
        shapes = self.keys()
        values = [
            tensors[k] if k in tensors else torch.zeros(shape, device="cpu") for k, shape in shapes.items()
        ]
        self.start = InitResult(values[0], values[1], values[2] if len(values) > 2 else None)


@dataclass
class Copy:
    """One module that will be trained whole."""

    site: Site
    wrapper: ModulesToSaveWrapper
    module: nn.Module


@dataclass
class Injection:
    """An adapter that is ready to be put into a model.

    Attributes:
        model: The model; unchanged until `commit`.
        config: The caller's configuration, copied and completed.
        plan: What matched and what did not.
        additions: Layers with their future factors.
        copies: Modules with their future copies.
    """

    model: nn.Module
    config: LoraConfig
    adapter: str
    plan: Plan
    additions: list[Addition]
    copies: list[Copy]
    autocast_adapter_dtype: bool = True
    _places: dict[str, Tensor] = field(default_factory=dict)

    def initialise(self, seed: int, meta: bool = False) -> None:
        """Compute the starting factors of every layer.

        Args:
            seed: The adapter's draw.
            meta: Give shapes without values (``low_cpu_mem_usage``): they will be loaded.
        """
        for addition in self.additions:
            if meta or _is_meta(addition.layer):
                shapes = list(addition.keys().values())
                a, b, *bias = (torch.empty(shape, device="meta") for shape in shapes)
                addition.start = InitResult(a, b, bias[0] if bias else None)
            else:
                addition.start = addition.layer.initialise(addition.spec, seed)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names on disk (without any prefix) of every tensor of the adapter, with their shapes."""
        result: dict[str, tuple[int, ...]] = {}
        for addition in self.additions:
            result.update(addition.keys())
        for trained in self.copies:
            for name, tensor in trained.module.state_dict().items():
                result[f"{trained.site.path}.{name}"] = tuple(tensor.shape)
        for name, parameter in self.biases():
            result[name] = tuple(parameter.shape)
        return result

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Names on disk of base tensors that a file may carry along: input and output embeddings."""
        return {name: tuple(p.shape) for name, p in self._embeddings().items()}

    def _embeddings(self) -> dict[str, nn.Parameter]:
        """Base embeddings, less those of which the adapter gets a copy of its own."""
        own = tuple(f"{trained.site.path}." for trained in self.copies)
        weights = embedding_weights(self.model, self._targets())
        return {name: weight for name, weight in weights.items() if not name.startswith(own)}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take all values from tensors with the names of `expected`; the base is not touched yet."""
        for addition in self.additions:
            addition.fill(tensors)
        for trained in self.copies:
            prefix = f"{trained.site.path}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            own = {k: v for k, v in own.items() if k in trained.module.state_dict()}
            trained.module.load_state_dict(own, strict=False, assign=_has_meta(trained.module))
        self._places = dict(tensors)

    def biases(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base biases that the adapter trains, by their name on disk (without prefix)."""
        copied = [trained.site.path for trained in self.copies]
        return bias_parameters(self.model, self.config.bias, self.adapter, self._targets(), copied)

    def _targets(self) -> dict[str, LoraLayer]:
        return {addition.site.path: addition.layer for addition in self.additions}

    def commit(self, *, active: list[str] | None = None, trainable: bool = True) -> None:
        """Put everything in its place. Nothing here can fail half-way.

        Args:
            active: Adapters that are active afterwards; None activates this one.
            trainable: Whether the activated parameters require gradients.
        """
        before = AdapterSet(self.model).modules()
        disabled = bool(before) and all(m.disable_adapters for m in before)
        own = {id(p) for m in before for name in m.held_adapters for p in m.adapter_parameters(name)}
        own |= {id(p) for _, p in self.biases()}
        for parameter in self.model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)
        for addition in self.additions:
            assert addition.start is not None
            dtype = factor_dtype(addition.layer, self.autocast_adapter_dtype)
            addition.layer.add_adapter(addition.spec, addition.start, dtype=dtype)
            if addition.site.module is not addition.layer:
                addition.site.replace(addition.layer)
        for trained in self.copies:
            trained.wrapper.add_copy(self.adapter, trained.module)
            if trained.site.module is not trained.wrapper:
                trained.site.replace(trained.wrapper)
        self._commit_base_tensors()
        _keep_out_of_fused_kernels(self.model)
        index = AdapterSet(self.model)
        if active is None:
            index.activate([self.adapter], inference_mode=not trainable)
        else:
            known = {id(m) for m in before}
            for module in index.modules():
                if id(module) not in known:
                    module.note_active(active)
        if disabled:
            index.enable(False)
        if trainable and (active is None or self.adapter in active):
            for _, parameter in self.biases():
                parameter.requires_grad_(True)

    def _commit_base_tensors(self) -> None:
        """Biases that the adapter trains, and embeddings that its file carries."""
        if not self._places:
            return
        named = dict(self.biases())
        named.update(embedding_weights(self.model))
        with torch.no_grad():
            for name, parameter in named.items():
                value = self._places.get(name)
                if value is not None and not torch.equal(parameter.cpu(), value.to(parameter.dtype)):
                    parameter.copy_(value)

    def changed_embeddings(self) -> list[str]:
        """Names of base embeddings that the file would replace by other values."""
        return [
            name
            for name, parameter in self._embeddings().items()
            if name in self._places
            and not parameter.is_meta
            and not torch.equal(parameter.detach().cpu(), self._places[name].to(parameter.dtype))
        ]


def _is_meta(layer: LoraLayer) -> bool:
    return backends.find(layer.base_layer).device(layer.base_layer).type == "meta"


def _has_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def bias_parameters(
    model: nn.Module,
    kind: str,
    adapter: str,
    future: Iterable[str] = (),
    copied: Iterable[str] = (),
) -> Iterator[tuple[str, nn.Parameter]]:
    """The base biases that an adapter with ``bias=kind`` trains, by their name on disk (without prefix).

    The names depend on what this adapter adapts, not on what other adapters of the model do.

    Args:
        model: The model.
        kind: "none", "lora_only" (biases of the layers that the adapter adapts) or "all".
        adapter: The adapter's name.
        future: Paths of layers that it is about to adapt.
        copied: Paths of modules that it is about to train whole.
    """
    if kind == "none":
        return
    own = {
        p: m for p, m in model.named_modules() if isinstance(m, AdapterModule) and adapter in m.held_adapters
    }
    adapted = {path for path, m in own.items() if isinstance(m, LoraLayer)} | set(future)
    whole = {path for path, m in own.items() if isinstance(m, ModulesToSaveWrapper)} | set(copied)
    roots = tuple(f"{path}." for path in whole)
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if last != "bias" or ".lora_" in f".{path}" or ".modules_to_save." in f".{name}":
            continue
        path = path.removesuffix(".base_layer").replace(".original_module", "")
        if f"{path}.".startswith(roots):
            continue  # the adapter trains its own copy
        if path in adapted:
            yield f"{path}.base_layer.bias", parameter
        elif kind == "all":
            yield f"{path}.bias" if path else "bias", parameter


def embedding_weights(
    model: nn.Module, future: Mapping[str, LoraLayer] | None = None
) -> dict[str, nn.Parameter]:
    """Input and output embedding weights by their name on disk (without prefix); empty for other models."""
    result: dict[str, nn.Parameter] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        call = getattr(model, getter, None)
        try:
            module = call() if callable(call) else None
        except (NotImplementedError, AttributeError):
            module = None
        if module is None:
            continue
        path = next((p for p, m in model.named_modules() if m is module), None)
        if path is None or isinstance(module, ModulesToSaveWrapper):
            continue
        if isinstance(module, LoraLayer):
            module, path = module.base_layer, f"{path}.base_layer"
        elif path in (future or {}):
            path = f"{path}.base_layer"
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            result[f"{path}.weight"] = weight
    return result


def _no_op(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: its presence is what counts."""


def _keep_out_of_fused_kernels(model: nn.Module) -> None:
    """Torch's transformer encoder, in evaluation, hands weights to one kernel and calls no submodule.

    It does not where a submodule has a hook, nor where nested tensors are switched off.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in (module.linear1, module.linear2):
                if isinstance(child, LoraLayer) and not child._forward_hooks:
                    child.register_forward_hook(_no_op)
        elif isinstance(module, nn.TransformerEncoder) and AdapterSet(module).modules():
            module.__dict__.setdefault(_NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False


def prepare(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    *,
    autocast_adapter_dtype: bool = True,
    strict_targets: bool = False,
    read_from_file: bool = False,
) -> Injection:
    """Work out and build an adapter beside the model, without touching it.

    Raises:
        ConfigError: If an option cannot be honoured.
        AdapterNameError: If the name is taken or unusable.
        TargetError: If nothing matches, or what matches cannot be adapted; all reasons at once.
    """
    check_adapter_name(adapter_name)
    check_config(config)
    _refuse_foreign_layers(model)
    if adapter_name in AdapterSet(model).names():
        raise AdapterNameError(
            f"the model has an adapter named {adapter_name!r} already; choose another name or "
            "delete_adapter first"
        )
    if not read_from_file:
        for sentence in config.advice():
            warnings.warn(sentence, VeneerWarning, stacklevel=3)
    own_config = copy.deepcopy(config)
    found = sites(model)
    chosen = _plan(model, found, own_config, adapter_name, strict=strict_targets, loading=read_from_file)
    additions, reasons = [], []
    for spec in chosen.specs:
        site = found[spec.path]
        reason = _refusal(site, spec)
        if reason is not None:
            reasons.append(f"{spec.path} ({type(site.base).__name__}): {reason}")
            continue
        cls = layers.find(site.base)
        assert cls is not None  # the plan holds supported modules only
        layer = site.module if isinstance(site.module, LoraLayer) else cls(site.base)
        additions.append(Addition(site, layer, spec))
    if reasons:
        raise TargetError(
            "these modules cannot be adapted as asked:\n" + "\n".join(f"  - {r}" for r in reasons)
        )
    copies = [_copy_of(found[path]) for path in chosen.modules_to_save]
    _complete(own_config, model, found, additions, copies)
    if not read_from_file:
        _mention_replaced_bases(additions)
    return Injection(model, own_config, adapter_name, chosen, additions, copies, autocast_adapter_dtype)


def _refusal(site: Site, spec: LoraSpec) -> str | None:
    cls = layers.find(site.base)
    assert cls is not None
    return why_not(site.module if isinstance(site.module, LoraLayer) else cls(site.base), spec)


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
        warnings.warn(
            "fan_in_fan_out=True, but no adapted layer stores its weight (in, out): it is ignored",
            VeneerWarning,
            stacklevel=4,
        )
        config.fan_in_fan_out = False
    if config.target_modules is None:
        names = targets.DEFAULT_TARGETS[model_type(model) or ""]
        config.target_modules = names if isinstance(names, str) else set(names)
    elif _only_here(config):
        paths = {a.site.path for a in additions}
        config.target_modules = set(targets.shortest_names(paths, set(found) - paths))
        if config.layers_to_transform is not None:
            config.layers_to_transform = config.layers_pattern = None
    heads = {c.site.path for c in copies}
    named = list(config.modules_to_save or [])
    for path in sorted(heads):
        if not any(targets.matches(pattern, path) for pattern in named):
            named.append(path.rpartition(".")[2])
    config.modules_to_save = named or None


def _mention_replaced_bases(additions: list[Addition]) -> None:
    """Say whose base changes too where an initialisation gives the layers another weight."""
    others = {
        name for a in additions if inits.find(a.spec.init).replaces_base for name in a.layer.held_adapters
    }
    if others:
        warnings.warn(
            f"init_lora_weights={additions[0].spec.init!r} replaces base weights, and the adapters "
            f"{', '.join(map(repr, sorted(others)))} work on the same ones: their outputs change",
            VeneerWarning,
            stacklevel=4,
        )


def _only_here(config: LoraConfig) -> bool:
    """Whether other readers would not understand the targets: ``all-linear``, or expressions in a list."""
    target = config.target_modules
    if isinstance(target, str):
        return target.lower() == "all-linear" or config.layers_to_transform is not None
    return any(looks_like_regex(pattern) for pattern in target or ())


def _refuse_foreign_layers(model: nn.Module) -> None:
    """Wrapping another library's adapted layers, or a whole PeftModel, would nest adapters silently."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterModule):
            continue
        if type(module).__module__.partition(".")[0] == "peft":
            raise TargetError(
                f"the model already holds layers of the peft library (at {path or 'its root'}): "
                "merge or unload them there first, or load their adapter here with PeftModel.from_pretrained"
            )
        if hasattr(type(module), "merge_and_unload") and path == "":
            raise TargetError(
                "the model is a PeftModel already: use model.add_adapter(name, config) for another adapter, "
                "or "
                "model.get_base_model() / model.unload() to start anew"
            )


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    strict_targets: bool = False,
) -> nn.Module:
    """Put an adapter into any torch module, in place.

    Args:
        peft_config: What to adapt.
        model: The module; every parameter but the adapter's is frozen.
        adapter_name: The adapter's name; it becomes the active one.
        low_cpu_mem_usage: Create the factors on the meta device, to be loaded.
        state_dict: Take the targets from the keys of this adapter, instead of from the configuration. Its
            values are not loaded (use `set_peft_model_state_dict`).
        strict_targets: Raise where part of the configuration matches nothing.

    Returns:
        The same object.

    Raises:
        TargetError: If nothing matches or cannot be adapted. The model is then as it was.
    """
    config = peft_config if state_dict is None else _targets_of(peft_config, state_dict)
    injection = prepare(
        model, config, adapter_name, autocast_adapter_dtype=False, strict_targets=strict_targets
    )
    injection.initialise(draw_seed(), meta=low_cpu_mem_usage)
    injection.commit()
    if state_dict is not None:
        injection.config.target_modules = peft_config.target_modules or injection.config.target_modules
    configs: dict[str, LoraConfig] = model.__dict__.setdefault("peft_config", {})
    configs[adapter_name] = injection.config
    return model


def _targets_of(config: LoraConfig, state_dict: Mapping[str, Tensor]) -> LoraConfig:
    """A copy of the configuration whose targets, ranks and strengths are those that the keys show."""
    ranks: dict[str, int] = {}
    for key, tensor in state_dict.items():
        for marker in (".lora_A.", ".lora_embedding_A"):
            path, mark, _ = key.partition(marker)
            if mark:
                ranks[path.removeprefix("base_model.model.")] = int(tensor.shape[0])
    if not ranks:
        raise TargetError(
            "the state dict holds no lora_A or lora_embedding_A key: it is not a LoRA adapter's"
        )
    result = copy.deepcopy(config)
    result.target_modules = set(ranks)
    result.exclude_modules = None
    result.layers_to_transform = result.layers_pattern = None
    result.rank_pattern = {f"^{path}$": r for path, r in ranks.items() if r != config.r}
    return result


def eject(model: nn.Module, *, before: Callable[[LoraLayer], None] | None = None) -> nn.Module:
    """Put every original module back in its place; in whole-trained modules the active copy.

    Args:
        model: A model with adapters.
        before: Called with each low-ranked layer first.

    Returns:
        The same model.
    """
    found = [site for site in sites(model).values() if isinstance(site.module, AdapterModule)]
    for site in found:
        if isinstance(site.module, LoraLayer):
            if before is not None:
                before(site.module)
            site.replace(site.module.base_layer)
        elif isinstance(site.module, ModulesToSaveWrapper):
            site.replace(site.module.current if before is not None else site.module.original_module)
        else:
            raise VeneerError(f"cannot take a {type(site.module).__name__} out of the model")
    for module in model.modules():
        if _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)
    model.__dict__.pop("peft_config", None)
    return model
