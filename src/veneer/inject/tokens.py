"""Which embeddings get rows of an adapter, and which heads follow them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from veneer.adapters import AdapterModule
from veneer.config import LoraConfig
from veneer.config.expressions import Paths
from veneer.config.values import name_in, show
from veneer.errors import Hint, TargetError, Text
from veneer.inject.base_tensors import embedding_of
from veneer.inject.injection import Rows
from veneer.inject.sites import Site
from veneer.layers.trainable_tokens import TrainableTokens, indices_by_module
from veneer.targets import by_ends
from veneer.wording import some, warn


def token_rows(
    model: nn.Module,
    found: Mapping[str, Site],
    config: LoraConfig,
    taken: Mapping[str, str],
    stored: Collection[str] | None = None,
    *,
    quiet: bool = False,
) -> list[Rows]:
    """What ``trainable_token_indices`` asks for, built beside the model.

    Where PEFT would take the keys for other modules, paths stand in the configuration instead.

    Args:
        model: The model.
        found: Its modules.
        config: Our copy of the configuration.
        taken: Paths that the same adapter adapts otherwise, with the option that says so.
        stored: Names of the tensors in the adapter's file, see `by_ends`.
        quiet: Do not warn of names that take more than modules of that whole name.

    Raises:
        TargetError: Listing everything that cannot be done.
    """
    if not config.trainable_token_indices:
        return []
    named, remarks, reasons = _named(model, found, config, stored)
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
        lines: list[str | Text] = ["these tokens cannot be trained:", *some(reasons), *remarks]
        raise TargetError(Text.join("\n  - ", lines))
    for remark in () if quiet else remarks:
        warn(remark)
    keys = config.trainable_token_indices
    if isinstance(keys, Mapping) and not _means(keys, set(named), found):
        config.trainable_token_indices = {row.site.path: row.indices for row in result if row.own}
    return result


def _layer(site: Site) -> TrainableTokens:
    return site.module if isinstance(site.module, TrainableTokens) else TrainableTokens(site.base)


def _named(
    model: nn.Module, found: Mapping[str, Site], config: LoraConfig, stored: Collection[str] | None
) -> tuple[dict[str, list[int]], list[Text], list[str]]:
    """The indices by path, what to say of them, and what is wrong."""
    module = embedding_of(model, "input")
    default = next((path for path, site in found.items() if site.module is module), "embed_tokens")
    assert config.trainable_token_indices is not None
    wanted = indices_by_module(config.trainable_token_indices, default)
    names, option = list(wanted), "trainable_token_indices"
    hits, remarks = by_ends(names, option, Paths(list(found)), found, stored)
    said = list(remarks.values())
    reasons = []
    first: dict[str, str] = {}
    for index, name in enumerate(names):
        reached = [path for path, indices in hits.items() if index in indices]
        if not reached:
            reasons.append(f"no module is called {show(name)}")
        for path in reached:
            if wanted[first.setdefault(path, name)] != wanted[name]:
                said.append(
                    Text(
                        Hint(option),
                        f" {show(name)}: {path} trains the tokens of {show(first[path])}, the first key "
                        "that takes it, as in PEFT",
                    )
                )
    return {path: wanted[name] for path, name in first.items()}, said, reasons


def _means(keys: Iterable[str], named: Collection[str], paths: Iterable[str]) -> bool:
    """Whether PEFT takes these keys for these modules."""
    ends = tuple(keys)
    return all(name_in(end) == end for end in ends) and {p for p in paths if p.endswith(ends)} == named


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
