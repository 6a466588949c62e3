"""The layers of a plan, built beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from veneer import layers
from veneer.adapters import AdapterSet
from veneer.config import LoraConfig
from veneer.errors import Text
from veneer.inject.injection import Addition
from veneer.inject.sites import Site
from veneer.layers import LoraLayer
from veneer.layers.making import why_not
from veneer.layers.parameter import LoraParameter, parameters_of, why_not_wrapped
from veneer.spec import LoraSpec


def build(
    model: nn.Module, found: Mapping[str, Site], specs: Sequence[LoraSpec], config: LoraConfig
) -> tuple[list[Addition], list[str | Text]]:
    """A layer for each spec, new or the one that is there; and all reasons why one cannot be."""
    additions: list[Addition] = []
    reasons: list[str | Text] = []
    for spec in specs:
        if not spec.parameter:
            site = found[spec.path]
            cls = layers.find(site.base)
            assert cls is not None  # the plan holds supported modules only
            known = isinstance(site.module, LoraLayer) and not isinstance(site.module, LoraParameter)
            layer = site.module if known else cls(site.base)
            assert isinstance(layer, LoraLayer)
            reason = why_not(layer, spec)
            if isinstance(site.module, LoraParameter):
                reason = "a parameter of it is adapted (target_parameters): name the module or the parameter"
            if reason is not None:
                reasons.append(Text(f"{spec.path} ({type(site.base).__name__}): ", reason))
                continue
            additions.append(Addition(site, layer, spec, spec.path, new=not known))
            additions += _inside(layer, site, spec)
    for owner, own in _by_module(specs).items():
        built = _parameters(found[owner], own, {s.path for s in specs if not s.parameter})
        additions += built[0]
        reasons += built[1]
    if not reasons and config.bias != "none" and any(a.layer.transparent for a in additions):
        kinds = sorted({type(a.layer.get_base_layer()).__name__ for a in additions if a.layer.transparent})
        reasons.append(
            f"bias={config.bias!r} beside adapters of {', '.join(kinds)}: their biases go by other names, "
            "which readers of adapter files do not agree on; leave bias='none'"
        )
    _place(found, additions)
    return additions, reasons


def _inside(layer: LoraLayer, site: Site, spec: LoraSpec) -> list[Addition]:
    """The children that are adapted along with their module."""
    result = []
    for name, times in layer.adapts_inside.items():
        base = layer.get_base_layer()
        child = base._modules[name]
        assert child is not None
        cls = layers.find(child)
        known = isinstance(child, LoraLayer)
        assert known or cls is not None
        inner = child if known else cls(child)  # type: ignore[misc]
        assert isinstance(inner, LoraLayer)
        path = f"{spec.path}.{name}"
        place = Site(path, child, [(base, name)])
        result.append(
            Addition(
                place, inner, replace(spec, path=path, owner=spec.path, times=times), path, new=not known
            )
        )
    return result


def _by_module(specs: Iterable[LoraSpec]) -> dict[str, list[LoraSpec]]:
    owners: dict[str, list[LoraSpec]] = {}
    for spec in specs:
        if spec.parameter:
            owners.setdefault(spec.path.removesuffix(f".{spec.parameter}"), []).append(spec)
    return owners


def _parameters(
    site: Site, specs: Sequence[LoraSpec], modules: set[str]
) -> tuple[list[Addition], list[str | Text]]:
    """Layers for parameters of one module, each around the one before, in the module's own order."""
    kind = type(site.base).__name__
    reason: str | Text | None = why_not_wrapped(site.module, [spec.parameter for spec in specs])
    if site.path in modules:
        reason = "both it and a parameter of it are named: name one of them"
    present = parameters_of(site.module)
    if not present and not isinstance(site.module, LoraLayer) and (held := AdapterSet(site.base).names()):
        reason = (
            f"{', '.join(map(repr, held))} adapts modules inside it, whose names in a file would change: "
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


def _place(found: Mapping[str, Site], additions: Sequence[Addition]) -> None:
    """Give every layer its path in the adapted model: one ``base_layer`` for each layer around it."""
    depth = {path: len(parameters_of(s.module)) or _wraps(s.module) for path, s in found.items()}
    for path in {a.site.path for a in additions if a.layer.transparent}:
        own = [a for a in additions if a.site.path == path]
        depth[path] = len(own)
        for inside, addition in enumerate(reversed(own)):
            addition.path = path + ".base_layer" * inside
    around = {path: n for path, n in depth.items() if n}
    for addition in additions:
        outer = [p for p in around if addition.site.path.startswith(f"{p}.")]
        for path in sorted(outer, key=len, reverse=True):
            addition.path = path + ".base_layer" * around[path] + addition.path.removeprefix(path)


def _wraps(module: nn.Module) -> int:
    return int(isinstance(module, LoraLayer) and module.transparent)
