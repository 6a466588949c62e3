"""Which modules an adapter takes: names in, `Plan` out. Nothing here knows torch.

One rule for every pattern, alone or in a list: a name, the end of a dotted path, a full path, or a regular
expression over the whole path. A pattern that matches nothing is reported with the nearest names that exist.

`plan` comes first, then its steps, the words for what went wrong, and the table of default targets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from veneer.config import LoraConfig, TaskType, looks_like_regex
from veneer.config.expressions import Paths, path_ends
from veneer.config.values import show
from veneer.errors import Hint, TargetError, Text
from veneer.module_names import around, by_ends
from veneer.spec import LoraSpec, PatternSet, resolve_all
from veneer.wording import bullets, listed, nearest, ranges, some, warn

ALL_LINEAR = "all-linear"
SHOWN = 10  # names listed in a message before "and N more"
LONGEST = 100  # characters of a name for which similar ones are looked up


@dataclass(frozen=True)
class Candidate:
    """A module of the model, seen as a possible target.

    Args:
        path: Dotted path in the model.
        type_name: Name of its class.
        supported: Whether it can be adapted.
        linear: Whether ``"all-linear"`` means it.
        output_head: The model's output projection; ``"all-linear"`` leaves it out.
        reason: Why it cannot be adapted; empty for a mere container of other modules.
        parameter: For a bare parameter, its name on the module that holds it.
    """

    path: str
    type_name: str
    supported: bool
    linear: bool = False
    output_head: bool = False
    reason: str = ""
    parameter: str = ""


@dataclass(frozen=True)
class Unmatched:
    """A pattern without the intended effect: its field, the nearest names, what is known about it."""

    field: str
    pattern: str
    suggestions: tuple[str, ...] = ()
    note: str = ""

    @property
    def message(self) -> Text:
        near = f"; nearest names: {', '.join(self.suggestions)}" if self.suggestions else ""
        return Text(Hint(self.field), f" {show(self.pattern)} {self.note or 'matches nothing'}{near}")

    def __str__(self) -> str:
        return str(self.message)


@dataclass(frozen=True)
class Skipped:
    """A module that a pattern reached and that gets no adapter, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What one adapter will do to a model.

    Args:
        adapter: Its name.
        specs: One `LoraSpec` for each module that gets factors, in the model's order.
        modules_to_save: Paths of the modules that train in full, in the model's order.
        unmatched: Patterns that change nothing.
        skipped: Modules that were reached and left out.
        matched: For each target pattern the paths of the specs that it matched.
    """

    adapter: str
    specs: tuple[LoraSpec, ...]
    modules_to_save: tuple[str, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    matched: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        specs = {spec.path: spec for spec in self.specs}
        rows = [("pattern", "modules", "layers", "r", "scale", "example")]
        for pattern, paths in self.matched.items():
            ranks = ranges(sorted({specs[p].r for p in paths}))
            scales = sorted({specs[p].scaling for p in paths})
            scale = f"{scales[0]:.4g}" + (f"..{scales[-1]:.4g}" if len(scales) > 1 else "") if scales else ""
            layers = ranges(sorted({i for p in paths if (i := layer_index(p)) is not None}))
            rows.append((pattern, str(len(paths)), layers, ranks, scale, paths[0] if paths else ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"adapter {self.adapter!r}: {len(self.specs)} modules"]
        lines += [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        if self.modules_to_save:
            lines.append(f"trained in full: {listed(self.modules_to_save, SHOWN)}")
        lines += some([str(entry) for entry in self.unmatched])
        reasons: dict[str, list[str]] = {}
        for entry in self.skipped:
            reasons.setdefault(entry.reason, []).append(entry.path)
        lines += [f"left out ({reason}): {listed(paths)}" for reason, paths in reasons.items()]
        return "\n".join(lines)


def head_names(task_type: TaskType | str | None) -> tuple[str, ...]:
    """The heads that train along with an adapter for a task, under any of these names."""
    if task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return ("classifier", "score")
    return ("qa_outputs",) if task_type == TaskType.QUESTION_ANS else ()


def plan(
    candidates: Sequence[Candidate],
    config: LoraConfig,
    adapter: str = "default",
    *,
    model_type: str | None = None,
    strict_targets: bool = False,
    loading: bool = False,
    stored: Collection[str] | None = None,
) -> Plan:
    """Decide what every module of a model gets from an adapter.

    Args:
        candidates: All modules of the model, in its order.
        config: The configuration; not changed.
        adapter: The adapter's name.
        model_type: The model's type in the sense of transformers, for the default targets.
        strict_targets: Raise for every pattern that matches nothing, not only when all of them do.
        loading: The adapter comes from a file, whose tensors will be accounted for one by one: say nothing
            about idle patterns, and let a module that is both targeted and in ``modules_to_save`` train in
            full, as PEFT does.
        stored: Names of the tensors in that file; see `by_ends`.

    Returns:
        The plan. Its ``unmatched`` patterns have been warned about.

    Raises:
        ConfigError: If the configuration holds invalid values.
        TargetError: If nothing matches, if a named target cannot be adapted or is in ``modules_to_save`` too,
            or, with ``strict_targets``, if any pattern matches nothing. The message lists all of it.
    """
    config.validate()
    modules = [c for c in candidates if c.path and not c.parameter]
    parameters = [c for c in candidates if c.parameter]
    paths = Paths([c.path for c in (*parameters, *modules)])
    patterns = _as_patterns(config.target_modules) or _defaults(config, model_type, modules)

    saved = _saved(config, modules, paths, stored)
    reached = _reached(config, patterns, modules, paths, saved.paths)
    by_parameter = _parameters(config, parameters)
    bare = {c.path: c.parameter for hits in by_parameter.values() for c in hits if c.supported}
    # PEFT adapts parameters whatever their layer, so its files have those of all layers.
    anywhere, within = (bare, {}) if loading else ({}, bare)
    in_layers, layers_unmatched = _in_layers(config, [*patterns, *by_parameter], [*reached.chosen, *within])

    chosen = {path: bare.get(path, "") for path in in_layers} | anywhere
    specs = tuple(resolve_all(config, adapter, chosen, paths).values())
    unmatched = [
        *saved.unmatched,
        *reached.unmatched,
        *_idle_targets(config, reached, saved.paths, modules),
        *layers_unmatched,
        *(Unmatched("target_parameters", p) for p, hits in by_parameter.items() if not hits),
        *(() if loading else _idle_numbers(config, chosen, paths)),
    ]
    unmatched = _with_nearest(unmatched, modules, parameters, chosen)

    refused = [*reached.refused, *(c for hits in by_parameter.values() for c in hits if not c.supported)]
    problems = [*_by_reason(refused), *(() if loading else reached.conflicts)]
    wrong = bool(problems) or not specs or (strict_targets and bool(unmatched))
    if wrong or (unmatched and not loading):
        message = _complaint(adapter, problems, unmatched, None if specs else modules)
        if wrong:
            raise TargetError(message)
        warn(message)
    for sentence in () if loading else saved.remarks:
        warn(sentence)
    return Plan(
        adapter=adapter,
        specs=specs,
        modules_to_save=tuple(saved.paths),
        unmatched=tuple(unmatched),
        skipped=tuple(Skipped(path, reason) for path, reason in (saved.inside | reached.skipped).items()),
        matched={
            pattern: tuple(c.path for c in hits if c.path in chosen)
            for pattern, hits in (reached.by_pattern | by_parameter).items()
        },
    )


# --- the steps of a plan, each from what the steps before it found ---


def _defaults(config: LoraConfig, model_type: str | None, modules: Sequence[Candidate]) -> list[str]:
    if config.target_parameters and config.target_modules is not None:
        return []
    if (defaults := DEFAULT_TARGETS.get(model_type or "")) is not None:
        return _as_patterns(defaults)
    if config.target_parameters:
        return []
    known = f"model type {model_type!r} has" if model_type else "a model without a model type has"
    names = _counted(modules)
    raise TargetError(
        f"{known} no default ",
        Hint("target_modules"),
        ": name them, or pass ",
        Hint("target_modules", ALL_LINEAR),
        f". Linear layers here: {names}" if names else ". There are no linear layers in this model",
    )


class _Saved(NamedTuple):
    """The modules that train in full.

    Attributes:
        paths: Their paths, in the model's order.
        inside: Modules inside them that are named too, with a sentence about each.
        unmatched: Names that match nothing.
        remarks: Sentences about names that take more than modules of that whole name.
    """

    paths: dict[str, None]
    inside: dict[str, str]
    unmatched: list[Unmatched]
    remarks: list[Text]


def _saved(
    config: LoraConfig, modules: Sequence[Candidate], paths: Paths, stored: Collection[str] | None
) -> _Saved:
    heads = head_names(config.task_type)
    named = list(dict.fromkeys(config.modules_to_save or ()))
    names = list(dict.fromkeys([*named, *heads]))
    hits, remarks = by_ends(names, "modules_to_save", paths, [c.path for c in modules], stored)
    saved: dict[str, None] = {}
    inside: dict[str, str] = {}
    used: set[int] = set()
    for path in (c.path for c in modules if hits[c.path]):
        used.update(hits[path])
        if outer := around(path, saved):
            inside[path] = f"inside {outer}, which trains in full"
        else:
            saved[path] = None
    unmatched = [
        Unmatched("modules_to_save", name)
        for index, name in enumerate(names)
        if index not in used and name not in heads
    ]
    if heads and not saved:
        task = TaskType(config.task_type).value
        note = f"is the head that trains along for task {task}, and this model has none"
        unmatched.append(Unmatched("modules_to_save", " or ".join(heads), note=note))
    return _Saved(saved, inside, unmatched, [text for i, text in remarks.items() if i < len(named)])


class _Reached(NamedTuple):
    """What the target patterns match.

    Attributes:
        by_pattern: For each pattern all modules that it matches.
        chosen: Paths of those that get factors, in the model's order.
        skipped: Paths of the others, with the reason.
        refused: Those of the others that are targeted by name and cannot be adapted.
        conflicts: Sentences about modules that are named to get factors and to train in full.
        unmatched: Exclusions that match nothing.
    """

    by_pattern: dict[str, list[Candidate]]
    chosen: list[str]
    skipped: dict[str, str]
    refused: list[Candidate]
    conflicts: list[Text]
    unmatched: list[Unmatched]


def _reached(
    config: LoraConfig,
    patterns: Sequence[str],
    modules: Sequence[Candidate],
    paths: Paths,
    saved: Collection[str],
) -> _Reached:
    """Match the target patterns, less exclusions, modules that train in full, and what cannot be adapted."""
    wildcard = next((p for p in patterns if p.lower() == ALL_LINEAR), None)
    names = [p for p in patterns if p.lower() != ALL_LINEAR]
    excluded = _as_patterns(config.exclude_modules)
    hits = PatternSet(names, "target_modules").over(paths)
    barred = PatternSet(excluded, "exclude_modules").over(paths)
    to_save = set(config.modules_to_save or ()).difference(head_names(config.task_type))
    holders = {c.path.rpartition(".")[0] for c in modules}
    by_pattern: dict[str, list[Candidate]] = {p: [] for p in patterns}
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    refused: list[Candidate] = []
    conflicts: list[Text] = []
    for c in modules:
        found = [names[i] for i in hits[c.path]]
        if wildcard and c.linear and not c.output_head:
            found.append(wildcard)
        if not found:
            continue
        for pattern in found:
            by_pattern[pattern].append(c)
        by_name = [p for p in found if p != wildcard and not looks_like_regex(p)]
        if barred[c.path]:
            skipped[c.path] = f"excluded by {show(excluded[barred[c.path][0]])}"
        elif outer := around(c.path, saved):
            skipped[c.path] = f"trains in full with {outer} of modules_to_save"
            if both := to_save.intersection(by_name):
                conflicts.append(_named_twice(c.path, both.pop()))
        elif c.supported:
            chosen.append(c.path)
        else:
            holder = "only holds other modules" if c.path in holders else "cannot be adapted"
            skipped[c.path] = f"{c.type_name}: {c.reason}" if c.reason else f"{c.type_name} {holder}"
            if c.reason and by_name:
                refused.append(c)
    used = {index for c in modules for index in barred[c.path]}
    idle = [Unmatched("exclude_modules", p) for index, p in enumerate(excluded) if index not in used]
    return _Reached(by_pattern, chosen, skipped, refused, conflicts, idle)


def _named_twice(path: str, pattern: str) -> Text:
    return Text(
        f"{path} is named by both ",
        Hint("target_modules"),
        " and ",
        Hint("modules_to_save"),
        f" ({show(pattern)}): it can get factors or train in full, not both",
    )


def _idle_targets(
    config: LoraConfig, reached: _Reached, saved: Collection[str], modules: Sequence[Candidate]
) -> list[Unmatched]:
    """Target patterns that match nothing, or what cannot be adapted; not those that are refused for it."""
    chosen, refused = set(reached.chosen), {c.path for c in reached.refused}
    result = []
    for pattern, hits in reached.by_pattern.items():
        note = ""
        if any(c.path in chosen for c in hits):
            without = [c for c in hits if c.reason and not c.supported and c.path not in refused]
            without = [c for c in without if not around(c.path, saved)]
            if not without:
                continue
            note = f"also matches what cannot be adapted: {'; '.join(_by_reason(without))}"
        elif (config.target_modules is None and chosen) or any(c.path in refused for c in hits):
            continue
        elif hits and all(not c.supported and not c.reason and c.path not in saved for c in hits):
            note = _only_containers(hits, modules)
        elif hits:
            reasons = dict.fromkeys(reached.skipped[c.path] for c in hits)
            note = f"matches only what is left out ({listed(reasons)})"
        result.append(Unmatched("target_modules", pattern, note=note))
    return result


def _only_containers(hits: Sequence[Candidate], modules: Sequence[Candidate]) -> str:
    roots = tuple(f"{c.path}." for c in hits)
    inside = dict.fromkeys(
        c.path.rpartition(".")[2] for c in modules if c.supported and c.path.startswith(roots)
    )
    more = f" and {len(hits) - 1} more like it" if len(hits) > 1 else ""
    instead = f"; name the modules inside instead: {listed(inside, SHOWN)}" if inside else ""
    return f"matches only {hits[0].path} ({hits[0].type_name}){more}, which cannot be adapted{instead}"


def _in_layers(
    config: LoraConfig, patterns: Collection[str], chosen: Sequence[str]
) -> tuple[list[str], list[Unmatched]]:
    """The modules in ``layers_to_transform``, and its numbers that are not there.

    A module whose full path is among the targets is taken whatever its layer.
    """
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return list(chosen), []
    wanted = set(layers if isinstance(layers, list) else [layers])
    before = _as_patterns(config.layers_pattern, ordered=True)
    numbers = _numbers_after(before, chosen) if before else {path: layer_index(path) for path in chosen}
    kept = [path for path in chosen if path in patterns or numbers[path] in wanted]
    present = {n for path, n in numbers.items() if n is not None and path not in patterns}
    if before and not present:
        return kept, [Unmatched("layers_pattern", pattern) for pattern in before]
    absent = sorted(wanted - present)
    if not absent:
        return kept, []
    there = f"targets lie in layers {ranges(sorted(present))}"
    note = f"is not there: {there if present else 'no target lies in a numbered layer'}"
    return kept, [Unmatched("layers_to_transform", ranges(absent), note=note)]


def _numbers_after(patterns: Sequence[str], paths: Iterable[str]) -> dict[str, int | None]:
    """For each path the number after the first place in it that the earliest pattern matches."""
    numbered = {path: _numbered(path) for path in paths}
    owners = Paths(list(dict.fromkeys(owner for found in numbered.values() for owner in found)))
    hits = PatternSet(patterns, "layers_pattern", anywhere=True).over(owners)
    result: dict[str, int | None] = {}
    for path, found in numbered.items():
        matched = [owner for owner in found if hits[owner]]
        result[path] = found[min(matched, key=lambda owner: hits[owner][0])] if matched else None
    return result


def _parameters(config: LoraConfig, parameters: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """What each of ``target_parameters`` matches: it is the path of a parameter, or the end of one."""
    reached: dict[str, list[Candidate]] = {p: [] for p in _as_patterns(config.target_parameters)}
    for c in parameters:
        for end in path_ends(c.path):
            if end in reached:
                reached[end].append(c)
    return reached


def _idle_numbers(config: LoraConfig, chosen: Collection[str], paths: Paths) -> list[Unmatched]:
    """The keys of ``rank_pattern`` and ``alpha_pattern`` that match no target."""
    result = []
    for option in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(config, option))
        hits = PatternSet(keys, option, anywhere=True).over(paths)
        used = {index for path in chosen for index in hits[path]}
        there = {index: path for path, found in reversed(hits.items()) for index in found}
        for index, key in enumerate(keys):
            if index in used:
                continue
            other = there.get(index)
            note = f"matches modules, such as {other}, but none that is adapted" if other else ""
            result.append(Unmatched(option, key, note=note))
    return result


# --- words for patterns that change nothing ---

_NO_MATCH = {
    "layers_pattern": "precedes no numbered layer",
    "rank_pattern": "matches no adapted module",
    "alpha_pattern": "matches no adapted module",
}


def _with_nearest(
    unmatched: Iterable[Unmatched],
    modules: Sequence[Candidate],
    parameters: Sequence[Candidate],
    chosen: Collection[str],
) -> list[Unmatched]:
    """Add the nearest names to the first of the patterns that nothing else is known about."""

    def names(option: str) -> list[str]:
        if option == "layers_pattern":
            every = (c.path for c in (*parameters, *modules))
            return [name for path in every for name in _BEFORE_NUMBER.findall(path)]
        if option in ("rank_pattern", "alpha_pattern"):
            return _ends(chosen)
        every_module = parameters if option == "target_parameters" else modules
        return _ends(c.path for c in every_module if c.supported or not option.startswith("target_"))

    result: list[Unmatched] = []
    for entry in unmatched:
        if not entry.note:
            near = _near(entry.pattern, names(entry.field)) if len(result) < SHOWN else ()
            entry = replace(entry, suggestions=near, note=_NO_MATCH.get(entry.field, ""))
        result.append(entry)
    return result


def _ends(paths: Iterable[str]) -> list[str]:
    """What can be suggested: the last one, two and three segments of paths, unless they hold a number."""
    ends = dict.fromkeys(end for path in paths for end in path_ends(path)[:-4:-1])
    return [end for end in ends if not any(part.isdigit() for part in end.split("."))]


def _near(pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names most like a pattern, or like the words of an expression."""
    words = [pattern.replace(" ", "_")]
    if looks_like_regex(pattern):
        words = re.findall(r"[A-Za-z_]\w{2,}", re.sub(r"\\[A-Za-z]", " ", pattern))[:SHOWN]
    near = dict.fromkeys(name for word in words if len(word) <= LONGEST for name in nearest(word, names, 3))
    return tuple(name for name in near if name not in words)[:5]


def _complaint(
    adapter: str,
    problems: Sequence[str | Text],
    unmatched: Sequence[Unmatched],
    modules: Sequence[Candidate] | None,
) -> Text:
    """Everything that is wrong, in one text; ``modules`` is None unless nothing at all is adapted."""
    lines: list[str | Text] = [*problems, *(entry.message for entry in unmatched)]
    head = f"{len(lines)} pattern{'s' if len(lines) > 1 else ''} without the effect that was asked for"
    if problems:
        head = "cannot be placed"
    elif modules is not None:
        head = "nothing to adapt"
        lines += [f"linear layers here: {names}"] if (names := _counted(modules)) else []
    return bullets(f"adapter {adapter!r}: {head}", lines)


def _by_reason(refused: Iterable[Candidate]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for c in refused:
        groups.setdefault((c.type_name, c.reason), []).append(c.path)
    return [f"{listed(paths)} ({kind}): {reason}" for (kind, reason), paths in groups.items()]


def _counted(modules: Iterable[Candidate]) -> str:
    """The last names of the linear layers that ``"all-linear"`` takes, with how many there are of each."""
    counts = Counter(
        c.path.rpartition(".")[2] for c in modules if c.linear and c.supported and not c.output_head
    )
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(24))


# --- names ---


def layer_index(path: str) -> int | None:
    """The number of the layer that a module lies in: the first number between two names of its path."""
    found = _LAYER.match(path)
    return int(found.group(1)) if found else None


_LAYER = re.compile(r"(?:.*?\.)??(?!\d+\.)[^.]+\.(\d+)\.")
_BEFORE_NUMBER = re.compile(r"([^.]+)\.\d+\.")


def _numbered(path: str) -> dict[str, int]:
    """What stands before each number that lies inside a path, with that number."""
    parts = path.split(".")
    return {".".join(parts[:i]): int(part) for i, part in enumerate(parts[:-1]) if i and part.isdecimal()}


def _as_patterns(value: Iterable[str] | str | None, ordered: bool = False) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    return list(value) if ordered else sorted(set(value))


# --- default targets ---

_QV = ("q_proj", "v_proj")
_DECODERS_WITH_QV = """
    llama llama4 llama4_text mistral ministral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next
    gemma gemma2 gemma3_text gemma3n_text stablelm starcoder2 smollm3 olmo olmo2 olmo3 olmoe cohere cohere2
    granite granitemoe helium exaone4 ernie4_5 ernie4_5_moe hunyuan_v1_dense seed_oss gpt_oss glm glm4
    glm4_moe phimoe minimax arcee apertus bitnet nemotron dots1 lfm2 jamba opt gptj gpt_neo bart mbart
    blenderbot blenderbot-small pegasus marian m2m_100 whisper speech_to_text wav2vec2 hubert
    clip_text_model clip_vision_model siglip_text_model siglip_vision_model
""".split()

#: By ``config.model_type`` of transformers: mostly the query and value projections, under their names there.
DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(_DECODERS_WITH_QV, _QV),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), ("q", "v")),
    **dict.fromkeys(
        "bert roberta xlm-roberta electra layoutlm camembert xlm-roberta-xl ernie".split(),
        ("query", "value"),
    ),
    # transformers 5 renamed the projections of these
    **dict.fromkeys(
        "vit deit dinov2 audio-spectrogram-transformer".split(),
        ("query", "value", "q_proj", "v_proj"),
    ),
    **dict.fromkeys(
        ("bloom", "gpt_neox", "persimmon", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"),
        ("query_key_value",),
    ),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "btlm": ("c_proj", "c_attn"),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "distilbert": ("q_lin", "v_lin"),
    "mpt": ("Wqkv",),
    "modernbert": ("Wqkv",),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj",),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
