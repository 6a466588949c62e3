"""One update for an embedding and the head that shares its weight: ``ensure_weight_tying``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from veneer import targets
from veneer.adapters import AdapterModule
from veneer.config import LoraConfig
from veneer.config.expressions import Paths
from veneer.errors import Hint, TargetError, Text
from veneer.inject.base_tensors import embedding_of
from veneer.inject.injection import Addition, Copy
from veneer.inject.sites import Site
from veneer.layers.embedding import LoraEmbedding
from veneer.layers.making import why_not
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.tied import LoraTiedHead
from veneer.spec import PatternSet, resolve
from veneer.wording import warn


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
    lead, heads = tied_modules(model, found)
    group = [lead, *heads]
    named_targets = config.target_modules
    named_targets = [named_targets] if isinstance(named_targets, str) else named_targets
    whole = _hits(targets.saved_modules(config.modules_to_save or ()), group)
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
        config.target_modules = _naming(config.target_modules, adapted, lead)
    elif not config.trainable_token_indices:
        problem = f"neither target_modules nor modules_to_save names any of {', '.join(group)}"
    if problem and not quiet:
        warn(f"ensure_weight_tying=True ties nothing: {problem}")
    return dict.fromkeys(heads, lead) if whole or adapted else {}


def tied_modules(model: nn.Module, found: Mapping[str, Site]) -> tuple[str, list[str]]:
    """The path of the input embedding, and those of the modules that share its weight."""
    module = embedding_of(model, "input")
    lead = next((p for p, s in found.items() if module is not None and module in (s.module, s.base)), "")
    weight = getattr(found[lead].base, "weight", None) if lead else None
    if weight is None:
        return lead, []
    same = [p for p, s in found.items() if getattr(s.base, "weight", None) is weight]
    return lead, [path for path in same if path != lead]


def _hits(patterns: PatternSet, paths: Sequence[str]) -> dict[str, set[str]]:
    """The paths that patterns match, and which patterns match each."""
    hits = patterns.over(Paths([path for path in paths if path]))
    return {path: {patterns.patterns[i] for i in indices} for path, indices in hits.items() if indices}


def _naming(named: Iterable[str] | str | None, hits: Mapping[str, set[str]], lead: str) -> str | set[str]:
    """Targets that name the embedding."""
    of_lead = hits.get(lead, set())
    if isinstance(named, str):
        return named if of_lead else f"(?:{named}|^{re.escape(lead)}$)"
    rest = {p for p in named or () if p in of_lead or not any(p in found for found in hits.values())}
    return rest if of_lead else {*rest, lead}


def tied_additions(
    found: Mapping[str, Site],
    additions: Sequence[Addition],
    ties: Mapping[str, str],
    config: LoraConfig,
    adapter: str,
) -> list[Addition]:
    """What the heads get that follow an adapted embedding.

    Raises:
        TargetError: Listing every reason why one cannot follow.
    """
    leads = {a.site.path: a for a in additions}
    result, reasons = [], []
    for path, lead in ties.items():
        if lead not in leads:
            continue
        site, leader, spec = found[path], leads[lead].layer, resolve(config, adapter, path)
        present = site.module if isinstance(site.module, LoraTiedHead) else None
        reason: str | Text | None = None
        if not isinstance(leader, LoraEmbedding) or not isinstance(site.base, nn.Linear):
            reason = "only a linear head can follow, and only an embedding"
        elif getattr(leader.base_layer, "max_norm", None) is not None:
            reason = "the embedding's max_norm renormalises rows, which the head does not"
        elif present is None and (isinstance(site.module, AdapterModule) or leader.held_adapters):
            names = {*leader.held_adapters, *getattr(site.module, "held_adapters", ())}
            reason = (
                f"{', '.join(map(repr, sorted(names)))} adapts the two without tying them: tie all adapters "
                "of a pair, or none"
            )
        elif (spec.r, spec.scaling) != (leads[lead].spec.r, leads[lead].spec.scaling):
            reason = f"the patterns give it another rank or strength than {lead}"
        if reason is None:
            assert isinstance(leader, LoraEmbedding)
            layer = present or LoraTiedHead(site.base, leader)
            reason = why_not(layer, spec)
            result.append(Addition(site, layer, spec, path, new=present is None))
        if reason is not None:
            reasons.append(Text(f"{path} ({type(site.base).__name__}): ", reason))
    if reasons:
        raise TargetError(
            Text.join(
                "\n  - ", ["ensure_weight_tying=True: these modules cannot follow the embedding:", *reasons]
            )
        )
    return result


def tied_copies(found: Mapping[str, Site], copies: Sequence[Copy], ties: Mapping[str, str]) -> list[Copy]:
    """Copies of the heads whose weight is that of the embedding's copy.

    Raises:
        TargetError: If a head is adapted in another way.
    """
    leads = {trained.site.path: trained for trained in copies}
    result = []
    for path, lead in ties.items():
        if lead not in leads:
            continue
        site, leader = found[path], leads[lead]
        known = isinstance(site.module, ModulesToSaveWrapper) and site.module.tied_adapter is leader.wrapper
        others = set(getattr(site.module, "held_adapters", ()))
        if known:
            assert isinstance(site.module, ModulesToSaveWrapper)
            wrapper = site.module
        elif isinstance(site.module, AdapterModule) or leader.wrapper.held_adapters:
            names = ", ".join(map(repr, sorted({*others, *leader.wrapper.held_adapters})))
            raise TargetError(
                f"ensure_weight_tying=True: {names} adapts {path} or {lead} without tying them: tie all "
                "adapters of a pair, or none"
            )
        else:
            wrapper = ModulesToSaveWrapper(site.base, leader.wrapper)
        result.append(Copy(site, wrapper, wrapper.new_copy(), follows=leader))
    return result


def check_tied(
    found: Mapping[str, Site], additions: Sequence[Addition], copies: Sequence[Copy], ties: Mapping[str, str]
) -> None:
    """Refuse an untied adapter of a pair that others have tied.

    Raises:
        TargetError: Naming the module.
    """
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
