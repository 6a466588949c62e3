"""The modules of a model as the plan sees them, and the plan itself."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from veneer import backends, layers, targets
from veneer.adapters import AdapterModule, AdapterSet
from veneer.config import LoraConfig
from veneer.inject.base_tensors import base_of, embedding_of
from veneer.inject.stacks import name_stacks, old_names
from veneer.layers import LoraLayer
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.trainable_tokens import TrainableTokens
from veneer.targets import Candidate, Plan


@dataclass
class Site:
    """A module and every parent that refers to it, with its name there.

    Its ``path`` is that in the model without adapters, whatever layers lie around it now.
    """

    path: str
    module: nn.Module
    parents: list[tuple[nn.Module, str]]

    @property
    def base(self) -> nn.Module:
        return base_of(self.module) if isinstance(self.module, AdapterModule) else self.module

    @property
    def reader(self) -> str | None:
        """The class that reads the module's weight and never calls it, for those that are known to.

        A quantised weight cannot be read like that.
        """
        if backends.quantised(self.base) is not None:
            return None
        return next((cls for parent, name in self.parents if (cls := layers.reader(parent, name))), None)

    def replace(self, module: nn.Module) -> None:
        for parent, name in self.parents:
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
                site.parents.append((module, name))
                continue
            path = f"{prefix}{name}"
            found[id(child)] = Site(path, child, [(module, name)])
            if not isinstance(child, AdapterModule):
                visit(child, f"{path}.")
            elif isinstance(child, LoraLayer) and child.transparent:
                visit(child.get_base_layer(), f"{path}.")

    visit(model, "")
    return {site.path: site for site in found.values()}


def bases(found: Mapping[str, Site]) -> dict[str, nn.Module]:
    return {path: site.base for path, site in found.items()}


def input_embedding(model: nn.Module, found: Mapping[str, Site]) -> str:
    """The path of the input embedding; empty where the model does not name one."""
    module = embedding_of(model, "input")
    return next((p for p, s in found.items() if module is not None and module in (s.module, s.base)), "")


def sharing(found: Mapping[str, Site], path: str) -> list[str]:
    """The paths of the other modules that have the weight of the one at ``path``."""
    weight = getattr(found[path].base, "weight", None) if path else None
    if weight is None:
        return []
    return [p for p, site in found.items() if p != path and getattr(site.base, "weight", None) is weight]


def _never_called(reader: str) -> str:
    """Why what a class reads without calling it gets no factors."""
    return (
        f"{reader} reads its weight without calling it, so factors beside it would never act and get no "
        "gradient: leave it out, or train it whole (modules_to_save)"
    )


def parameter_candidates(model: nn.Module, found: Mapping[str, Site], unread: bool) -> list[Candidate]:
    """What `targets.plan` needs to know of each parameter that a module holds by itself."""
    result = [
        Candidate(
            name, "Parameter", False, parameter=name, reason="the model itself holds it, which nothing wraps"
        )
        for name, tensor in model._parameters.items()
        if tensor is not None
    ]
    for path, site in found.items():
        for name, tensor in site.base._parameters.items():
            if tensor is None:
                continue
            reason = "" if tensor.dim() in (2, 3) else "only a matrix or a stack of matrices is adapted"
            if isinstance(site.module, ModulesToSaveWrapper):
                reason = "its module is trained whole (modules_to_save)"
            elif not unread and (reader := site.reader) is not None:
                reason = _never_called(reader)
            result.append(Candidate(f"{path}.{name}", "Parameter", not reason, parameter=name, reason=reason))
    return result


def candidates(model: nn.Module, found: Mapping[str, Site], unread: bool = False) -> list[Candidate]:
    """What `targets.plan` needs to know of each module.

    Args:
        model: The model.
        found: Its modules.
        unread: Take what the model reads without calling it, too.
    """
    head = embedding_of(model, "output")
    experts = old_names(bases(found), model_type(model))
    result = []
    for path, site in found.items():
        base = site.base
        cls = layers.find(base)
        reason = _why_not(site, cls is not None, unread)
        linear = cls is not None and cls.linear and path.rpartition(".")[2] not in experts
        result.append(
            Candidate(
                path=path,
                type_name=type(base).__name__,
                supported=cls is not None and not reason,
                linear=linear,
                output_head=base is head or site.module is head,
                reason=reason,
            )
        )
    return result


def _why_not(site: Site, has_layer: bool, unread: bool) -> str:
    """Why a module cannot get factors; empty if it can, or if it is of no type that anybody would adapt."""
    module = site.module
    if isinstance(module, ModulesToSaveWrapper | TrainableTokens) and module.held_adapters:
        names = ", ".join(map(repr, module.held_adapters))
        if isinstance(module, TrainableTokens):
            return f"{names} trains single tokens of it (trainable_token_indices)"
        if has_layer:
            return f"{names} trains it whole (modules_to_save)"
    if isinstance(site.parents[0][0], nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention reads this module's weight without calling it: target the attention "
            "itself, whose two projections are adapted together"
        )
    if has_layer and not unread and (reader := site.reader) is not None:
        return _never_called(reader)
    return layers.refusal(site.base) or ""


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
    config.validate()
    return plan_sites(root, sites(root), copy.deepcopy(config), adapter_name, strict=strict_targets)


def plan_sites(
    model: nn.Module,
    found: Mapping[str, Site],
    config: LoraConfig,
    adapter_name: str,
    *,
    strict: bool = False,
    loading: bool = False,
    unread: bool = False,
    stored: Collection[str] | None = None,
) -> Plan:
    """The plan for the sites that were found; see `targets.plan` and `candidates`.

    Stacks of experts among the targets are written into the configuration; see `name_stacks`.
    """
    name_stacks(config, bases(found), model_type(model), quiet=loading)
    modules = candidates(model, found, unread)
    return targets.plan(
        [*modules, *parameter_candidates(model, found, unread)] if config.target_parameters else modules,
        config,
        adapter_name,
        model_type=model_type(model),
        strict_targets=strict,
        loading=loading,
        stored=stored,
    )
