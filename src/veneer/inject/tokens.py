"""Which embeddings get rows of an adapter, and which heads follow them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from veneer.adapters import AdapterModule
from veneer.config import LoraConfig
from veneer.config.expressions import Paths
from veneer.config.values import name_in, show
from veneer.errors import Hint, TargetError, Text
from veneer.inject.injection import Rows
from veneer.inject.sites import Site, input_embedding, sharing
from veneer.layers.trainable_tokens import TrainableTokens, indices_by_module
from veneer.module_names import by_ends
from veneer.wording import bullets, some, warn


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
        taken: Paths that the same adapter adapts otherwise, with the option that names them.
        stored: Names of the tensors in the adapter's file, see `by_ends`.
        quiet: Do not warn of names that take more than modules of that whole name.

    Raises:
        TargetError: Listing everything that cannot be done.
    """
    if not config.trainable_token_indices:
        return []
    named, remarks, reasons = _named(model, found, config, stored)
    for path, indices in named.items():
        if (reason := _why_not(found[path], indices, taken.get(path))) is not None:
            reasons.append(f"{path} ({type(found[path].base).__name__}): {reason}")
    result: list[Rows] = []
    if not reasons:
        result, reasons = _built(found, named, taken)
    if reasons:
        raise TargetError(bullets("these tokens cannot be trained:", [*some(reasons), *remarks], 40))
    for remark in () if quiet else remarks:
        warn(remark)
    keys = config.trainable_token_indices
    if isinstance(keys, Mapping) and not _means(keys, set(named), found):
        config.trainable_token_indices = {row.site.path: row.indices for row in result if row.own}
    return result


def _why_not(site: Site, indices: Sequence[int], option: str | None) -> str | None:
    """Why an adapter cannot train tokens of a module, which an option may name already."""
    if option is not None:
        return f"{option} names it too: an embedding is adapted in one way"
    module = site.module
    if isinstance(module, AdapterModule) and module.held_adapters and not isinstance(module, TrainableTokens):
        names = ", ".join(map(repr, module.held_adapters))
        return f"{names} adapts it as a whole; an embedding is adapted in one way at a time"
    return TrainableTokens.refuses(site.base, indices)


def _built(
    found: Mapping[str, Site], named: Mapping[str, list[int]], taken: Collection[str]
) -> tuple[list[Rows], list[str]]:
    """The rows of every embedding, and those of the heads that follow it; and why a head cannot follow."""
    result: list[Rows] = []
    reasons = []
    leaders = _leaders(found, named)
    for path, indices in named.items():
        if path in leaders:
            continue
        layer = _layer(found[path])
        rows = layer.start(indices)
        result.append(Rows(found[path], layer, indices, rows))
        for head in (head for head, leader in leaders.items() if leader == path):
            module = found[head].module
            follows = isinstance(module, TrainableTokens) and module.tied_adapter is not None
            if head in taken or (isinstance(module, AdapterModule) and module.held_adapters and not follows):
                reasons.append(
                    f"{head} shares the weight of {path} and is adapted in another way: its outputs could "
                    "not follow the trained rows. Leave it out, or untie the two"
                )
            else:
                result.append(Rows(found[head], _layer(found[head], layer), indices, rows))
    return result, reasons


def _layer(site: Site, leader: TrainableTokens | None = None) -> TrainableTokens:
    module = site.module
    if isinstance(module, TrainableTokens) and (module.held_adapters or module.tied_adapter is leader):
        return module
    return TrainableTokens(site.base, leader)


def _named(
    model: nn.Module, found: Mapping[str, Site], config: LoraConfig, stored: Collection[str] | None
) -> tuple[dict[str, list[int]], list[Text], list[str]]:
    """The indices by path, remarks about them, and what is wrong."""
    default = input_embedding(model, found) or "embed_tokens"
    assert config.trainable_token_indices is not None
    wanted = indices_by_module(config.trainable_token_indices, default)
    names, option = list(wanted), "trainable_token_indices"
    hits, remarks = by_ends(names, option, Paths(list(found)), found, stored)
    texts = list(remarks.values())
    reasons = []
    first: dict[str, str] = {}
    for index, name in enumerate(names):
        reached = [path for path, indices in hits.items() if index in indices]
        if not reached:
            reasons.append(f"no module is called {show(name)}")
        for path in reached:
            if wanted[first.setdefault(path, name)] != wanted[name]:
                texts.append(
                    Text(
                        Hint(option),
                        f" {show(name)}: {path} trains the tokens of {show(first[path])}, the first key "
                        "that takes it, as in PEFT",
                    )
                )
    return {path: wanted[name] for path, name in first.items()}, texts, reasons


def _means(keys: Iterable[str], named: Collection[str], paths: Iterable[str]) -> bool:
    """Whether PEFT takes these keys for these modules."""
    ends = tuple(keys)
    return all(name_in(end) == end for end in ends) and {p for p in paths if p.endswith(ends)} == named


def _leaders(found: Mapping[str, Site], named: Mapping[str, list[int]]) -> dict[str, str]:
    """Heads and embeddings that share the weight of one whose tokens are trained: their path to its path."""
    result: dict[str, str] = {}
    for path, indices in named.items():
        if path in result or not isinstance(found[path].base, nn.Embedding):
            continue
        for other in sharing(found, path):
            has_rows = isinstance(found[other].base, nn.Linear | nn.Embedding)
            if has_rows and named.get(other, indices) == indices:
                result.setdefault(other, path)
    return result
