"""One update for an embedding and the head that shares its weight: ``ensure_weight_tying``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from veneer import module_names
from veneer.adapters import AdapterModule
from veneer.config import LoraConfig
from veneer.config.expressions import Paths
from veneer.errors import Hint, TargetError, Text
from veneer.inject.injection import Addition, Copy
from veneer.inject.sites import Site, input_embedding, sharing
from veneer.layers.embedding import LoraEmbedding
from veneer.layers.making import why_not
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.tied import LoraFollower, LoraTiedEmbedding, LoraTiedHead
from veneer.spec import LoraSpec, PatternSet, resolve
from veneer.wording import bullets, warn


def tie(model: nn.Module, found: Mapping[str, Site], config: LoraConfig, *, quiet: bool) -> dict[str, str]:
    """The heads that are to follow the input embedding, by their path, with its path.

    Where the configuration names any of them among its targets or its modules to save, it names the embedding
    instead afterwards, as PEFT's files do.

    Args:
        model: The model.
        found: Its modules.
        config: The configuration, which is written to.
        quiet: Say nothing of an option that ties nothing: it comes from a file.

    Raises:
        TargetError: If one of them is to be trained whole, and another by LoRA.
    """
    if not config.ensure_weight_tying:
        return {}
    lead = input_embedding(model, found)
    heads = sharing(found, lead)
    group = [lead, *heads]
    named_targets = config.target_modules
    named_targets = [named_targets] if isinstance(named_targets, str) else named_targets
    whole = _hits(module_names.saved_modules(config.modules_to_save or ()), group)
    adapted = _hits(PatternSet(named_targets or (), "target_modules"), group)
    if whole and adapted:
        raise TargetError(
            "ensure_weight_tying=True: ",
            Hint("modules_to_save"),
            f" names {next(iter(whole))} and ",
            Hint("target_modules"),
            f" {next(iter(adapted))}, which share one weight: name them in one of the two",
        )
    problem = ""
    if not heads:
        problem = "no module shares the weight of the input embedding"
    elif whole:
        of_heads = {name for head in heads for name in whole.get(head, ())}
        named = [name for name in config.modules_to_save or () if name not in of_heads]
        kept = whole.get(lead, set()) - of_heads
        config.modules_to_save = named if kept else [*named, lead]
    elif adapted:
        config.target_modules = _naming(config.target_modules, adapted, group)
    elif not config.trainable_token_indices:
        problem = f"neither target_modules nor modules_to_save names any of {', '.join(group)}"
    if problem and not quiet:
        warn(f"ensure_weight_tying=True ties nothing: {problem}")
    return dict.fromkeys(heads, lead) if whole or adapted else {}


def _hits(patterns: PatternSet, paths: Sequence[str]) -> dict[str, set[str]]:
    hits = patterns.over(Paths([path for path in paths if path]))
    return {path: {patterns.patterns[i] for i in indices} for path, indices in hits.items() if indices}


def _naming(
    named: Iterable[str] | str | None, hits: Mapping[str, set[str]], group: Sequence[str]
) -> str | set[str]:
    """Targets that name the embedding, and, if PEFT does not take it for one by its name, a head too."""
    lead = group[0]
    wanted = [lead] if lead.endswith("embed_tokens") else [lead, group[-1]]
    missing = [path for path in wanted if path not in hits]
    if isinstance(named, str):
        return "|".join([f"(?:{named})" if missing else named, *(f"^{re.escape(path)}$" for path in missing)])
    kept = set().union(*(hits.get(path, set()) for path in wanted))
    rest = {p for p in named or () if p in kept or not any(p in found for found in hits.values())}
    return {*rest, *missing}


def followers(
    found: Mapping[str, Site],
    additions: Sequence[Addition],
    copies: Sequence[Copy],
    ties: Mapping[str, str],
    config: LoraConfig,
    adapter: str,
) -> tuple[list[Addition], list[Copy]]:
    """What the heads get that follow an embedding: layers over its factors, or copies with its copy's weight.

    Args:
        found: The modules of the model.
        additions: The layers of the adapter.
        copies: Its copies.
        ties: What `tie` gave.
        config: The configuration.
        adapter: The adapter's name.

    Raises:
        TargetError: If a head cannot follow, or if other adapters tie a pair that this one does not.
    """
    _check_tied(found, additions, copies, ties)
    return _layers_of_heads(found, additions, ties, config, adapter), _copies_of_heads(found, copies, ties)


def _check_tied(
    found: Mapping[str, Site], additions: Sequence[Addition], copies: Sequence[Copy], ties: Mapping[str, str]
) -> None:
    """Refuse an untied adapter of a pair that others have tied."""
    tied: dict[int, tuple[str, ...]] = {}
    for site in found.values():
        if isinstance(site.module, AdapterModule) and (lead := site.module.tied_adapter) is not None:
            tied.update(dict.fromkeys((id(site.module), id(lead)), site.module.held_adapters))
    parts: list[tuple[str, nn.Module]] = [(a.site.path, a.layer) for a in additions]
    for path, module in [*parts, *((c.site.path, c.wrapper) for c in copies)]:
        if path not in {*ties, *ties.values()} and (names := tied.get(id(module))):
            raise TargetError(
                f"{path}: {', '.join(map(repr, names))} ties the embedding and the head; another adapter of "
                "either needs ensure_weight_tying=True too"
            )


def _layers_of_heads(
    found: Mapping[str, Site],
    additions: Sequence[Addition],
    ties: Mapping[str, str],
    config: LoraConfig,
    adapter: str,
) -> list[Addition]:
    leads = {a.site.path: a for a in additions}
    result, reasons = [], []
    for path, lead in ties.items():
        if lead not in leads:
            continue
        site, leader, spec = found[path], leads[lead], resolve(config, adapter, path)
        layer = site.module if isinstance(site.module, LoraFollower) else None
        reason = _why_not_tied(site, layer, leader, spec)
        if reason is None:
            assert isinstance(leader.layer, LoraEmbedding)
            kind = LoraTiedHead if isinstance(site.base, nn.Linear) else LoraTiedEmbedding
            layer = layer or kind(site.base, leader.layer)
            reason = why_not(layer, spec)
            result.append(Addition(site, layer, spec, path, new=layer is not site.module))
        if reason is not None:
            reasons.append(Text(f"{path} ({type(site.base).__name__}): ", reason))
    if reasons:
        head = "ensure_weight_tying=True: these modules cannot follow the embedding:"
        raise TargetError(bullets(head, reasons))
    return result


def _why_not_tied(
    site: Site, present: LoraFollower | None, leader: Addition, spec: LoraSpec
) -> str | Text | None:
    """Why a head or another embedding cannot follow an embedding, whatever its own layer can do."""
    embedding = leader.layer
    if not isinstance(embedding, LoraEmbedding) or not isinstance(site.base, nn.Linear | nn.Embedding):
        return "only a linear head or an embedding can follow, and only an embedding"
    if any(getattr(base, "max_norm", None) is not None for base in (embedding.base_layer, site.base)):
        return "an embedding's max_norm renormalises its rows alone"
    if present is None and (names := _untied(site.module, embedding)) is not None:
        return f"{names} adapts the two without tying them: {_ALL_OR_NONE}"
    if (spec.r, spec.scaling) != (leader.spec.r, leader.spec.scaling):
        return f"the patterns give it another rank or strength than {leader.site.path}"
    return None


def _copies_of_heads(
    found: Mapping[str, Site], copies: Sequence[Copy], ties: Mapping[str, str]
) -> list[Copy]:
    leads = {trained.site.path: trained for trained in copies}
    result = []
    for path, lead in ties.items():
        if lead not in leads:
            continue
        site, leader = found[path], leads[lead]
        wrapper = site.module
        if not isinstance(wrapper, ModulesToSaveWrapper) or wrapper.tied_adapter is not leader.wrapper:
            if (names := _untied(site.module, leader.wrapper)) is not None:
                raise TargetError(
                    f"ensure_weight_tying=True: {names} adapts {path} or {lead} without tying them: "
                    f"{_ALL_OR_NONE}"
                )
            wrapper = ModulesToSaveWrapper(site.base, leader.wrapper)
        result.append(Copy(site, wrapper, wrapper.new_copy(), follows=leader))
    return result


_ALL_OR_NONE = "tie all adapters of a pair, or none"


def _untied(head: nn.Module, leader: AdapterModule) -> str | None:
    """The adapters of a head, and of an embedding that it does not follow yet; None if both are free."""
    names = {*leader.held_adapters, *(head.held_adapters if isinstance(head, AdapterModule) else ())}
    return ", ".join(map(repr, sorted(names))) if names else None
