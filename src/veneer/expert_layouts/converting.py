"""A whole adapter from one layout of its experts to another: tensors and configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from veneer.config import LoraConfig
from veneer.config.expressions import Paths
from veneer.errors import ExportError, Text
from veneer.expert_layouts import reading, writing
from veneer.expert_layouts.experts import Experts
from veneer.expert_layouts.layouts import STACKS, Layout
from veneer.expert_layouts.mixture import Mixture
from veneer.files.keys import PREFIX
from veneer.spec import LoraSpec, PatternSet, alpha_of, resolve_all, restate
from veneer.wording import bullets

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?[AB](?:\.weight)?")
_MOST = 10


@dataclass(frozen=True)
class Converted:
    """An adapter in another layout.

    Attributes:
        config: Its configuration.
        tensors: By their names on disk.
        experts: The factors of its experts, as they were read.
        notes: What else has changed.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    experts: Experts
    notes: tuple[str, ...]


def convert(
    config: LoraConfig, tensors: Mapping[str, Tensor], source: Layout, target: Layout, mixture: Mixture
) -> Converted:
    """Bring the experts of an adapter into another layout; whatever else it has stays as it is.

    Args:
        config: The adapter's configuration.
        tensors: By their names on disk.
        source: The layout that they are in.
        target: The one to write.
        mixture: What is known of the base model.

    Returns:
        The adapter; ``s·B A`` of every expert is what it was, but for one rounding of B where gate and up
        differ in strength and are joined.

    Raises:
        ExportError: What the file has cannot be read as the source, or the target has no place for it; all
            of it is listed.
    """
    if mixture.as_stored and source is not target:
        raise ExportError(
            "the experts of Llama 4 are (experts, in, out), which PEFT takes for (experts, out, in): "
            f"their factors stay in the layout {source.name}"
        )
    named = {_renamed(name, source, mixture): tensor for name, tensor in tensors.items()}
    experts, others = read_all(config, named, source, mixture)
    made = writing.write(target, experts, mixture)
    _refuse(f"the layout {target.name} ({target.program}) does not support", made.problems)
    rest: dict[str, Tensor] = {}
    moved: dict[str, str] = {}
    for name in others:
        new = writing.renamed(name, target, mixture) if experts else name
        moved[name] = _renamed(new, target, mixture, back=True)
        rest[moved[name]] = named[name]
    own, notes = _config(config, moved, made, target)
    own.target_modules = _modules(config, moved, made.modules)
    return Converted(own, {**rest, **made.tensors}, experts, notes)


def read_all(
    config: LoraConfig, tensors: Mapping[str, Tensor], layout: Layout, mixture: Mixture
) -> tuple[Experts, list[str]]:
    """The factors of all experts, and the names of all other tensors.

    Raises:
        ExportError: What belongs to experts cannot be read; all of it is listed.
    """
    found = reading.find({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)
    experts, problems = reading.read(layout.over(mixture.transposed), config, tensors, found)
    _refuse("the experts cannot be read", problems)
    return experts, found.others


def _refuse(what: str, problems: Iterable[str | Text]) -> None:
    lines = list(problems)
    if lines:
        raise ExportError(bullets(f"{what}:", lines, _MOST))


def _renamed(name: str, layout: Layout, mixture: Mixture, back: bool = False) -> str:
    """A name as transformers has it, or back again."""
    table = [
        *layout.renames,
        *([(".attn.", ".self_attn.")] if layout.renames and mixture.interleaved else []),
    ]
    for theirs, ours in table:
        name = name.replace(ours, theirs) if back else name.replace(theirs, ours)
    return name


def _config(
    config: LoraConfig, moved: Mapping[str, str], made: writing.Written, target: Layout
) -> tuple[LoraConfig, tuple[str, ...]]:
    own, notes = copy.deepcopy(config), []
    modules = {old: _module(new) for old, new in moved.items() if _FACTOR.fullmatch(new)}
    given = resolve_all(config, "", {_module(old): "" for old in modules})
    old_specs = {new: given[_module(old)] for old, new in modules.items()}
    specs = [LoraSpec(new, "", spec.r, spec.lora_alpha) for new, spec in old_specs.items()]
    specs += [
        LoraSpec(path, "", r, alpha_of(scaling, r, config.use_rslora))
        for path, (r, scaling) in made.ranks.items()
    ]
    restate(own, {spec.path: spec for spec in specs}.values())
    own.use_rslora = config.use_rslora
    kept = {name for name in config.target_parameters or () if name.rpartition(".")[2] not in STACKS}
    own.target_parameters = sorted(kept | made.parameters) or None
    if own.lora_dropout and made.parameters:
        notes.append(
            f"lora_dropout {own.lora_dropout:g} is written as 0: PEFT has no dropout for target_parameters"
        )
        own.lora_dropout = 0.0
    return own, tuple(notes)


def _module(name: str) -> str:
    """The path of the module that a factor belongs to; inside a wrapper, that of the wrapper."""
    match = _FACTOR.fullmatch(name)
    assert match is not None
    return match["path"].removeprefix(PREFIX).partition(".base_layer")[0]


def _modules(config: LoraConfig, moved: Mapping[str, str], experts: set[str]) -> list[str]:
    """The names for ``target_modules``: those given that mean other modules, and those of experts."""
    paths = {_module(old): _module(new) for old, new in moved.items() if _FACTOR.fullmatch(old)}
    given = config.target_modules
    if given is None or isinstance(given, str):
        return sorted({new.rpartition(".")[2] for new in paths.values()} | experts)
    patterns = sorted(given)
    hits = PatternSet(patterns, "target_modules").over(Paths(list(paths)))
    meant = {patterns[i] for found in hits.values() for i in found}
    covered = {path for path, found in hits.items() if found}
    lost = {new.rpartition(".")[2] for old, new in paths.items() if old not in covered}
    return sorted(meant | lost | experts)
