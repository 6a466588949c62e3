"""More layers from the same weights: ``layer_replication``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.config import LoraConfig
from veneer.config.values import show
from veneer.errors import ConfigError, TargetError

#: A model becomes at most so many times as long, or this long where it is short.
TIMES = 10
FEWEST = 100
#: Where a model keeps what its layers were before.
_KEPT = "_layers_before_replication"


@dataclass
class Replication:
    """A list of layers and the longer one that takes its place.

    The new layers share every parameter with those that they repeat; only adapters are their own.

    Attributes:
        owner: The module that holds the list.
        name: The list's name there.
        before: The list.
        after: The list that takes its place.
        config: The model's configuration, if it has one.
        counts: What the configuration has about layers, before and after.
        ranges: ``layer_replication``.
    """

    owner: nn.Module
    name: str
    before: nn.ModuleList
    after: nn.ModuleList
    config: Any
    counts: tuple[dict[str, Any], dict[str, Any]]
    ranges: list[list[int]]

    def install(self) -> None:
        self.owner._modules[self.name] = self.after
        self._describe(self.counts[1])

    def remove(self) -> None:
        self.owner._modules[self.name] = self.before
        self._describe(self.counts[0])

    def _describe(self, counts: dict[str, Any]) -> None:
        for name, value in counts.items():
            setattr(self.config, name, value)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which the model has the longer list."""
        self.install()
        try:
            yield
        finally:
            self.remove()


def replication(model: nn.Module, config: LoraConfig) -> Replication | None:
    """What ``layer_replication`` asks for, built beside the model; None where nothing is to be done.

    ``[[0, 4], [2, 5]]`` makes the layers 0, 1, 2, 3, 2, 3, 4.

    Raises:
        ConfigError: If the ranges are none of this model.
        TargetError: If the model was replicated otherwise, holds adapters already, or has no list of layers.
    """
    if not config.layer_replication:
        return None
    ranges = [list(pair) for pair in config.layer_replication]
    kept = model.__dict__.get(_KEPT)
    if kept is not None:
        if kept.ranges != ranges:
            raise TargetError(
                f"the layers were replicated as {show(kept.ranges)} for another adapter, not as "
                f"{show(ranges)}"
            )
        return None
    if config.bias != "none":
        raise ConfigError("layer_replication shares the base's biases among layers: bias must be 'none'")
    owner, name = _layers_of(model)
    layers: nn.ModuleList = getattr(owner, name)
    order = _order(ranges, len(layers))
    if any(hasattr(m, "held_adapters") for m in layers.modules()):
        raise TargetError(
            "layer_replication would repeat layers that hold adapters: load or add this adapter first"
        )
    after = nn.ModuleList(_repeated(layers[i], place) for place, i in enumerate(order)).train(layers.training)
    settings = getattr(owner, "config", None)
    before = {
        key: getattr(settings, key)
        for key in ("num_hidden_layers", "layer_types")
        if getattr(settings, key, None) is not None
    }
    later = {key: len(order) if isinstance(v, int) else [v[i] for i in order] for key, v in before.items()}
    return Replication(owner, name, layers, after, settings, (before, later), ranges)


def keep(model: nn.Module, change: Replication) -> None:
    """Replicate for good, to be taken back by `restore`."""
    change.install()
    model.__dict__[_KEPT] = change


def is_replicated(model: nn.Module) -> bool:
    return _KEPT in model.__dict__


def restore(model: nn.Module, *, merged: bool) -> None:
    """Give a model its layers back; one that was merged keeps them, with weights of their own."""
    change = model.__dict__.pop(_KEPT, None)
    if change is None:
        return
    if merged:
        _part(change.after)
    else:
        change.remove()


def _part(layers: nn.ModuleList) -> None:
    """Give layers that share parameters their own, as a model that is saved must have."""
    taken: set[int] = set()
    for layer in layers:
        own: dict[int, nn.Parameter] = {}
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in taken:
                    if id(parameter) not in own:
                        copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                        own[id(parameter)] = copied
                    module._parameters[name] = own[id(parameter)]
        taken |= {id(parameter) for parameter in layer.parameters()}


def _order(ranges: Sequence[Sequence[int]], count: int) -> list[int]:
    for pair in ranges:
        if not 0 <= pair[0] < pair[1] <= count:
            raise ConfigError(
                f"layer_replication: {show(pair)} is not [start, end] with 0 <= start < end <= {count}, the "
                "number of layers here"
            )
    total, most = sum(end - start for start, end in ranges), max(FEWEST, TIMES * count)
    if total > most:
        raise ConfigError(
            f"layer_replication: {show(ranges)} makes {total:,} layers of the {count} here; at most {most} "
            "are built: give fewer or shorter ranges"
        )
    return [index for start, end in ranges for index in range(start, end)]


def _layers_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name, as PEFT looks for it."""
    inner: nn.Module = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model  # type: ignore[assignment]
    inner = inner.bert if isinstance(getattr(inner, "bert", None), nn.Module) else inner  # type: ignore[assignment]
    encoder = getattr(inner, "encoder", None)
    for owner, name in ((inner, "layers"), (encoder, "layer"), (inner, "h")):
        if isinstance(owner, nn.Module) and isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise TargetError("layer_replication: this model has no list of layers under layers, encoder.layer or h")


def _repeated(layer: nn.Module, place: int) -> nn.Module:
    """A layer with the same parameters, and a place of its own in caches."""
    twin = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
    for module in twin.modules():
        if hasattr(module, "layer_idx"):
            module.__dict__["layer_idx"] = place
    return twin
