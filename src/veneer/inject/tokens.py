"""Which embeddings get rows of an adapter, and which heads follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer import backends
from veneer.adapters import AdapterModule
from veneer.config import LoraConfig
from veneer.config.expressions import Paths
from veneer.config.values import show
from veneer.errors import TargetError
from veneer.inject.embeddings import embedding_of
from veneer.inject.places import Site
from veneer.layers.trainable_tokens import PreparedRows, TrainableTokens, indices_by_module
from veneer.spec import PatternSet
from veneer.wording import some

_KEY = "token_adapter.trainable_tokens_delta"


@dataclass
class Rows:
    """The rows of one embedding, or of a head that follows one."""

    site: Site
    layer: TrainableTokens
    indices: list[int]
    rows: Tensor

    @property
    def key(self) -> str:
        """The name on disk, under the model's prefix."""
        return f"{self.site.path}.{_KEY}"

    @property
    def own(self) -> bool:
        """Whether the adapter has a tensor here."""
        return self.layer.tied_adapter is None

    def prepared(self, *, widen: bool) -> PreparedRows:
        """The rows as the layer will hold them, in the base's type or wider."""
        base = self.layer.get_base_layer()
        device, dtype = backends.find(base).device(base), self.layer.base_dtype()
        if widen and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        return self.layer.prepared(self.indices, self.rows.to(device=device, dtype=dtype))

    def put(self, adapter: str, rows: PreparedRows) -> None:
        """Give the layer the rows, and put it in its place."""
        self.layer.put_rows(adapter, rows)
        if self.site.module is not self.layer:
            self.site.replace(self.layer)


def token_rows(
    model: nn.Module, found: Mapping[str, Site], config: LoraConfig, taken: Mapping[str, str]
) -> list[Rows]:
    """What ``trainable_token_indices`` asks for, built beside the model.

    Args:
        model: The model.
        found: Its modules.
        config: The configuration.
        taken: Paths that the same adapter adapts otherwise, with the option that says so.

    Raises:
        TargetError: Listing everything that cannot be done.
    """
    if not config.trainable_token_indices:
        return []
    named, reasons = _named(model, found, config)
    for path, indices in named.items():
        site = found[path]
        reason = TrainableTokens.refuses(site.base, indices)
        if path in taken:
            reason = f"{taken[path]} names it too: an embedding is adapted in one way"
        elif isinstance(site.module, AdapterModule) and not isinstance(site.module, TrainableTokens):
            held = ", ".join(map(repr, site.module.held_adapters))
            reason = f"{held} adapts it as a whole; an embedding is adapted in one way at a time"
        if reason is not None:
            reasons.append(f"{path} ({type(site.base).__name__}): {reason}")
    result: list[Rows] = []
    heads = {} if reasons else _followers(found, named)
    for path, indices in named.items():
        if reasons or path in heads:
            continue
        layer = _layer(found[path])
        result.append(Rows(found[path], layer, indices, layer.start(indices)))
        for head in (h for h, leader in heads.items() if leader == path):
            site = found[head]
            if head in taken or (
                isinstance(site.module, AdapterModule) and _layer(site).tied_adapter is None
            ):
                reasons.append(
                    f"{head} shares the weight of {path} and is adapted in another way: its outputs could "
                    "not follow the trained rows. Leave it out, or untie the two"
                )
                continue
            follower = (
                _layer(site)
                if isinstance(site.module, TrainableTokens)
                else TrainableTokens(site.base, layer)
            )
            result.append(Rows(site, follower, indices, result[-1].rows))
    if reasons:
        raise TargetError("\n  - ".join(["these tokens cannot be trained:", *some(reasons)]))
    return result


def _layer(site: Site) -> TrainableTokens:
    return site.module if isinstance(site.module, TrainableTokens) else TrainableTokens(site.base)


def _named(
    model: nn.Module, found: Mapping[str, Site], config: LoraConfig
) -> tuple[dict[str, list[int]], list[str]]:
    module = embedding_of(model, "input")
    default = next((path for path, site in found.items() if site.module is module), "embed_tokens")
    named: dict[str, list[int]] = {}
    reasons = []
    assert config.trainable_token_indices is not None
    wanted = indices_by_module(config.trainable_token_indices, default)
    reached: dict[int, list[str]] = {}
    for path, hits in PatternSet(wanted, "trainable_token_indices").over(Paths(list(found))).items():
        for index in hits:
            reached.setdefault(index, []).append(path)
    for index, (name, indices) in enumerate(wanted.items()):
        named.update(dict.fromkeys(reached.get(index, ()), indices))
        if index not in reached:
            reasons.append(f"no module is called {show(name)}")
    return named, reasons


def _followers(found: Mapping[str, Site], named: Mapping[str, list[int]]) -> dict[str, str]:
    """Heads and embeddings that share the weight of one whose tokens are trained: their path to its path."""
    result = {}
    for path, indices in named.items():
        if not isinstance(found[path].base, nn.Embedding):
            continue
        weight = getattr(found[path].base, "weight", None)
        for other, site in found.items():
            if other == path or other in result or path in result:
                continue
            if not isinstance(site.base, nn.Linear | nn.Embedding):
                continue
            if getattr(site.base, "weight", None) is weight and named.get(other, indices) == indices:
                result[other] = path
    return result
