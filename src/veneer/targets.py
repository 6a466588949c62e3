"""Which modules an adapter takes: names in, :class:`Plan` out. Nothing here knows torch.

One rule for every pattern, alone or in a list: a name, the end of a dotted path, a full path, or a regular
expression over the whole path. Whatever matches nothing is said, with the nearest names that exist.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from veneer.config import LoraConfig, TaskType, looks_like_regex
from veneer.config.expressions import Paths, path_ends
from veneer.config.values import name_in, show
from veneer.errors import Hint, TargetError, Text
from veneer.spec import LoraSpec, PatternSet, resolve_all
from veneer.wording import listed, nearest, some, warn

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
        router: Chooses experts; ``"all-linear"`` leaves it out.
        reason: Why it cannot be adapted; empty for a mere container of other modules.
        parameter: For a bare parameter, its name on the module that holds it.
    """

    path: str
    type_name: str
    supported: bool
    linear: bool = False
    output_head: bool = False
    router: bool = False
    reason: str = ""
    parameter: str = ""


@dataclass(frozen=True)
class Unmatched:
    """A pattern without the effect asked for: its field, the nearest names, what is known about it."""

    field: str
    pattern: str
    suggestions: tuple[str, ...] = ()
    note: str = ""

    @property
    def message(self) -> Text:
        """All of it in one sentence."""
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
        specs: One :class:`LoraSpec` for each module that gets factors, in the model's order.
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
        config: What is asked for; not changed.
        adapter: The adapter's name.
        model_type: The model's type in the sense of transformers, for the default targets.
        strict_targets: Raise for every pattern that matches nothing, not only when all of them do.
        loading: The adapter comes from a file, whose tensors will be accounted for one by one: say nothing
            about idle patterns, and let a module that is both targeted and in ``modules_to_save`` train in
            full, as PEFT does.
        stored: Names of the tensors in that file. A module whose path merely ends in a name of
            ``modules_to_save`` is left out where the file has a tensor of none of these: it was written when
            Veneer took names for whole ones.

    Returns:
        The plan. Its ``unmatched`` patterns have been warned about.

    Raises:
        ConfigError: If the configuration holds invalid values.
        TargetError: If nothing matches, if a named target cannot be adapted or is in ``modules_to_save`` too,
            or, with ``strict_targets``, if any pattern matches nothing. The message lists all of it.
    """
    config.validate()
    planner = _Planner(candidates, config, model_type)
    planner.choose_saved(stored)
    planner.choose_targets()
    planner.filter_layers()
    planner.choose_parameters()
    parameters = {path: planner.paths[path].parameter for path in planner.chosen}
    specs = tuple(resolve_all(config, adapter, parameters, planner.all_paths).values())
    if not loading:
        planner.check_number_patterns()
    if loading:
        planner.conflicts.clear()
    if planner.conflicts or planner.refused or not specs or (strict_targets and planner.unmatched):
        raise TargetError(planner.complaint(adapter, nothing=not specs))
    if planner.unmatched and not loading:
        warn(planner.complaint(adapter, nothing=False))
    for sentence in () if loading else planner.remarks:
        warn(sentence)
    return Plan(
        adapter=adapter,
        specs=specs,
        modules_to_save=tuple(planner.saved),
        unmatched=tuple(planner.unmatched),
        skipped=tuple(Skipped(path, reason) for path, reason in planner.skipped.items()),
        matched={p: tuple(x for x in paths if x in planner.chosen) for p, paths in planner.matched.items()},
    )


class _Planner:
    """The state of one call of :func:`plan`."""

    def __init__(self, candidates: Sequence[Candidate], config: LoraConfig, model_type: str | None) -> None:
        self.parameters = [c for c in candidates if c.parameter]
        self.candidates = [c for c in candidates if c.path and not c.parameter]
        self.paths = {c.path: c for c in [*self.parameters, *self.candidates]}
        self.all_paths = Paths(list(self.paths))
        self.config = config
        self.unmatched: list[Unmatched] = []
        self.refused: list[Candidate] = []
        self.conflicts: list[Text] = []
        self.remarks: list[Text] = []
        self.parents = {end for c in self.candidates if (end := c.path.rpartition(".")[0])}
        self.skipped: dict[str, str] = {}
        self.saved: dict[str, None] = {}
        self.chosen: dict[str, list[str]] = {}  # path -> the target patterns that matched it
        self.matched: dict[str, list[str]] = {}  # target pattern -> paths
        self.by_default = config.target_modules is None
        self.patterns = _as_patterns(config.target_modules) or self._defaults(model_type)

    def _defaults(self, model_type: str | None) -> list[str]:
        if self.config.target_parameters and not self.by_default:
            return []
        defaults = DEFAULT_TARGETS.get(model_type or "")
        if defaults is not None:
            return _as_patterns(defaults)
        if self.config.target_parameters:
            return []
        known = f"model type {model_type!r} has" if model_type else "a model without a model type has"
        names = ", ".join(f"{name} ({count})" for name, count in linear_names(self.candidates).items())
        raise TargetError(
            f"{known} no default ",
            Hint("target_modules"),
            ": name them, or pass ",
            Hint("target_modules", ALL_LINEAR),
            f". Linear layers here: {names}" if names else ". There are no linear layers in this model",
        )

    # --- modules that train in full

    def choose_saved(self, stored: Collection[str] | None) -> None:
        """Find the modules of ``modules_to_save`` and the heads of the task."""
        heads = head_names(self.config.task_type)
        asked = list(dict.fromkeys(self.config.modules_to_save or ()))
        wanted = list(dict.fromkeys([*asked, *heads]))
        modules = [c.path for c in self.candidates]
        hits, remarks = by_ends(wanted, "modules_to_save", self.all_paths, modules, stored)
        self.remarks += [remark for index, remark in remarks.items() if index < len(asked)]
        used: set[int] = set()
        for c in self.candidates:
            used.update(hits[c.path])
            if not hits[c.path]:
                continue
            if outer := self._saved_around(c.path):
                self.skipped[c.path] = f"inside {outer}, which trains in full"
            else:
                self.saved[c.path] = None
        for index, name in enumerate(wanted):
            if index not in used and name not in heads:
                self._idle("modules_to_save", name)
        if heads and not self.saved:
            task = TaskType(self.config.task_type).value
            note = f"is the head that trains along for task {task}, and this model has none"
            self._idle("modules_to_save", " or ".join(heads), note)

    def _saved_around(self, path: str) -> str | None:
        return next((end for end in (path, *parents(path)) if end in self.saved), None)

    # --- modules that get factors

    def choose_targets(self) -> None:
        """Match the target patterns, less exclusions, modules that train in full, and what has no adapter."""
        names = [p for p in self.patterns if p.lower() != ALL_LINEAR]
        wildcard = next((p for p in self.patterns if p.lower() == ALL_LINEAR), None)
        excluded = _as_patterns(self.config.exclude_modules)
        hits = PatternSet(names, "target_modules").over(self.all_paths)
        barred = PatternSet(excluded, "exclude_modules").over(self.all_paths)
        self.matched = {p: [] for p in self.patterns}
        reached: dict[str, list[Candidate]] = {p: [] for p in self.patterns}
        exclusions: set[int] = set()
        for c in self.candidates:
            found = [names[i] for i in hits[c.path]]
            if wildcard and c.linear and not c.output_head and not c.router:
                found.append(wildcard)
            outs = barred[c.path]
            exclusions.update(outs)
            for pattern in found:
                reached[pattern].append(c)
            if found and outs:
                self.skipped[c.path] = f"excluded by {show(excluded[outs[0]])}"
            elif found and self._is_open(c, found):
                self.chosen[c.path] = found
                for pattern in found:
                    self.matched[pattern].append(c.path)
        for index, pattern in enumerate(excluded):
            if index not in exclusions:
                self._idle("exclude_modules", pattern)
        self._report_idle_targets(reached)

    def _is_open(self, c: Candidate, found: list[str]) -> bool:
        """Whether a matched module can be adapted; else note why, or refuse what was asked for by name."""
        named = [p for p in found if p.lower() != ALL_LINEAR and not looks_like_regex(p)]
        if outer := self._saved_around(c.path):
            self.skipped[c.path] = f"trains in full with {outer} of modules_to_save"
            asked = set(self.config.modules_to_save or ()) - set(head_names(self.config.task_type))
            if both := asked.intersection(named):
                self.conflicts.append(
                    Text(
                        f"{c.path} is named by both ",
                        Hint("target_modules"),
                        " and ",
                        Hint("modules_to_save"),
                        f" ({show(both.pop())}): it can get factors or train in full, not both",
                    )
                )
            return False
        if c.supported:
            return True
        if c.reason and named:
            self.refused.append(c)
        holder = "only holds other modules" if c.path in self.parents else "cannot be adapted"
        self.skipped[c.path] = f"{c.type_name}: {c.reason}" if c.reason else f"{c.type_name} {holder}"
        return False

    def _report_idle_targets(self, reached: dict[str, list[Candidate]]) -> None:
        complained = {c.path for c in self.refused}
        for pattern in self.patterns:
            hits = reached[pattern]
            if self.matched[pattern]:
                silent = complained.union(c.path for c in hits if self._saved_around(c.path))
                barred = [c for c in hits if c.reason and not c.supported and c.path not in silent]
                if barred:
                    note = f"also matches what cannot be adapted: {'; '.join(_by_reason(barred))}"
                    self._idle("target_modules", pattern, note, near=False)
            elif (self.by_default and self.chosen) or any(c.path in complained for c in hits):
                continue
            elif not hits:
                self._idle("target_modules", pattern)
            elif all(not c.supported and not c.reason and c.path not in self.saved for c in hits):
                self._suggest_inside(pattern, hits)
            else:
                reasons = list(dict.fromkeys(self.skipped[c.path] for c in hits))
                note = f"matches only what is left out ({listed(reasons)})"
                self._idle("target_modules", pattern, note, near=False)

    def _suggest_inside(self, pattern: str, hits: list[Candidate]) -> None:
        roots = tuple(c.path + "." for c in hits)
        inside = dict.fromkeys(
            c.path.rpartition(".")[2] for c in self.candidates if c.supported and c.path.startswith(roots)
        )
        note = f"matches only {hits[0].path} ({hits[0].type_name})"
        if len(hits) > 1:
            note += f" and {len(hits) - 1} more like it"
        note += ", which cannot be adapted"
        if inside:
            note += f"; name the modules inside instead: {listed(inside, SHOWN)}"
        self._idle("target_modules", pattern, note, near=False)

    # --- layers

    def filter_layers(self) -> None:
        """Leave out layers that are not in ``layers_to_transform``; a full path is taken at its word."""
        layers = self.config.layers_to_transform
        if layers is None or layers == []:
            return
        wanted = set(layers if isinstance(layers, list) else [layers])
        before = _as_patterns(self.config.layers_pattern, ordered=True)
        lists = {path: _numbered(path) for path in self.chosen} if before else {}
        owners = Paths(list(dict.fromkeys(owner for found in lists.values() for owner in found)))
        hits = PatternSet(before, "layers_pattern", anywhere=True).over(owners)
        present: set[int] = set()
        for path, found in list(self.chosen.items()):
            if path in found:
                continue
            index = layer_index(path) if not before else _first_index(lists[path], hits)
            if index is not None:
                present.add(index)
            if index not in wanted:
                del self.chosen[path]
        if before and not present:
            near = _near(before, {m for path in self.paths for m in re.findall(r"([^.]+)\.\d+\.", path)})
            self.unmatched.append(
                Unmatched("layers_pattern", " or ".join(before), near, "precedes no numbered layer")
            )
        elif absent := sorted(wanted - present):
            there = (
                f"targets lie in layers {ranges(sorted(present))}"
                if present
                else "no target lies in a numbered layer"
            )
            self.unmatched.append(
                Unmatched("layers_to_transform", ranges(absent), (), f"is not there: {there}")
            )

    # --- bare parameters

    def choose_parameters(self) -> None:
        """Match ``target_parameters``, each the path of a parameter or the end of one."""
        reached: dict[str, list[Candidate]] = {
            p: [] for p in sorted(set(self.config.target_parameters or ()))
        }
        for c in self.parameters:
            for end in path_ends(c.path):
                reached.get(end, []).append(c)
        for pattern, hits in reached.items():
            usable = [c for c in hits if c.supported]
            self.matched[pattern] = [c.path for c in usable]
            for c in usable:
                self.chosen.setdefault(c.path, []).append(pattern)
            self.refused += [c for c in hits if not c.supported]
            if not hits:
                self._idle("target_parameters", pattern)

    # --- numbers for some modules

    def check_number_patterns(self) -> None:
        """Name the keys of ``rank_pattern`` and ``alpha_pattern`` that match no target."""
        for name in ("rank_pattern", "alpha_pattern"):
            keys = list(getattr(self.config, name))
            hits = PatternSet(keys, name, anywhere=True).over(self.all_paths)
            used = {index for path in self.chosen for index in hits[path]}
            there = {index: path for path, found in reversed(hits.items()) for index in found}
            for index, key in enumerate(keys):
                if index in used:
                    continue
                if index in there:
                    note = f"matches modules, such as {there[index]}, but none that is adapted"
                    self._idle(name, key, note, near=False)
                else:
                    self._idle(name, key, "matches no adapted module")

    # --- words

    def _idle(self, name: str, pattern: str, note: str = "", near: bool = True) -> None:
        suggestions: tuple[str, ...] = ()
        if near and len(self.unmatched) < SHOWN:
            if name in ("rank_pattern", "alpha_pattern"):
                usable = list(self.chosen)
            else:
                every = self.parameters if name == "target_parameters" else self.candidates
                usable = [c.path for c in every if c.supported or not name.startswith("target_")]
            suggestions = _near(_words(pattern), _ends(usable))
        self.unmatched.append(Unmatched(name, pattern, suggestions, note))

    def complaint(self, adapter: str, *, nothing: bool) -> Text:
        """Everything that is wrong, in one text."""
        lines: list[str | Text] = [*_by_reason(self.refused), *self.conflicts]
        head = f"adapter {adapter!r}: " + (
            "cannot be placed" if lines else "nothing to adapt" if nothing else ""
        )
        lines += [entry.message for entry in self.unmatched]
        if head.endswith("nothing to adapt") and (names := linear_names(self.candidates)):
            lines.append("linear layers here: " + ", ".join(f"{n} ({k})" for n, k in names.items()))
        elif head.endswith(": "):
            head += (
                f"{len(lines)} pattern{'s' if len(lines) > 1 else ''} without the effect that was asked for"
            )
        return Text.join("\n  - ", [head, *some(lines)])


# --- names ---


def layer_index(path: str) -> int | None:
    """The number of the layer that a module lies in: the first number between two names of its path."""
    found = _LAYER.match(path)
    return int(found.group(1)) if found else None


_LAYER = re.compile(r"(?:.*?\.)??(?!\d+\.)[^.]+\.(\d+)\.")


def _numbered(path: str) -> dict[str, int]:
    """What stands before each number that lies inside a path, with that number."""
    parts = path.split(".")
    return {".".join(parts[:i]): int(part) for i, part in enumerate(parts[:-1]) if i and part.isdecimal()}


def _first_index(numbered: Mapping[str, int], hits: Mapping[str, Sequence[int]]) -> int | None:
    """The number after the first place that the earliest pattern matches."""
    found = [(hits[owner][0], number) for owner, number in numbered.items() if hits[owner]]
    return min(found, key=lambda entry: entry[0])[1] if found else None


def linear_names(candidates: Iterable[Candidate], limit: int = 24) -> dict[str, int]:
    """The last names of the linear layers that ``"all-linear"`` takes, with how many there are of each."""
    counts: dict[str, int] = {}
    for c in candidates:
        if c.path and c.linear and c.supported and not c.output_head and not c.router:
            name = c.path.rpartition(".")[2]
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:limit])


def shortest_names(targets: Iterable[str], others: Iterable[str]) -> list[str]:
    """The fewest ends of paths that match all targets and no other module: what readers of a file understand.

    Args:
        targets: Paths of the adapted modules.
        others: Paths of all other modules.

    Returns:
        Sorted names. A target whose own path is the end of another module's path is listed with that path,
        though names cannot tell the two apart.
    """
    forbidden = {end for path in others for end in path_ends(path)}
    names = set()
    for path in targets:
        free = [end for end in path_ends(path) if end not in forbidden]
        names.add(free[-1] if free else path)
    return sorted(names)


def by_ends(
    names: Sequence[str],
    option: str,
    paths: Paths,
    modules: Iterable[str],
    stored: Collection[str] | None = None,
) -> tuple[dict[str, list[int]], dict[int, Text]]:
    """What names take as PEFT reads them: every module whose path ends in one, with a dot before it or not.

    Args:
        names: Names and expressions.
        option: The option that holds them.
        paths: All paths.
        modules: Those of them that are modules.
        stored: Names of the tensors in the adapter's file. Where that has a tensor of none of the modules
            that merely end in a name, they are left out: Veneer wrote it while it took names for whole ones.

    Returns:
        The indices of the names that take each path; and for the index of each name that takes more than
        modules of that whole name, a sentence that says so.
    """
    whole = PatternSet(names, option).over(paths)
    hits = PatternSet(names, option, inside=True).over(paths)
    more: dict[int, list[str]] = {}
    for path in modules:
        for index in set(hits[path]).difference(whole[path]):
            more.setdefault(index, []).append(path)
    remarks = {}
    for index, merely in sorted(more.items()):
        if stored is not None and not _any_stored(merely, stored):
            for path in merely:
                hits[path].remove(index)
            continue
        named = [path for path in paths.paths if index in whole[path]]
        also = f"{listed(merely, 1)} too. For {listed(named, 1)} alone give the whole path"
        remarks[index] = Text(
            Hint(option),
            f" {show(names[index])} takes every module whose path ends in it, as in PEFT: ",
            also if named else listed(merely),
        )
    return hits, remarks


def saved_modules(names: Iterable[str]) -> PatternSet:
    """The patterns of ``modules_to_save``: a name is the end of a path, with a dot before it or not."""
    return PatternSet(names, "modules_to_save", inside=True)


def portable_saved(named: Iterable[str], saved: Collection[str], paths: Iterable[str]) -> list[str]:
    """Names that mean in a file exactly the modules that train in full, to PEFT too.

    Args:
        named: The names and expressions that they were asked for with; those that do are kept.
        saved: Paths of the modules that train in full.
        paths: Paths of all modules.
    """
    named = [name for name in dict.fromkeys(named) if name_in(name) == name]
    ends = [path.rpartition(".")[2] for path in saved]
    candidates = list(dict.fromkeys([*named, *ends]))
    if not candidates:
        return []
    wrong: set[int] = set()
    for path, hits in saved_modules(candidates).over(Paths(list(paths))).items():
        if hits and not any(end in saved for end in (path, *parents(path))):
            wrong.update(hits)
    clean = {name for index, name in enumerate(candidates) if index not in wrong}
    result = [name for name in named if name in clean]
    for path, hits in saved_modules(result).over(Paths(sorted(saved))).items():
        if not hits:
            end = path.rpartition(".")[2]
            result.append(end if end in clean else path)
    return list(dict.fromkeys(result))


def _any_stored(paths: Iterable[str], stored: Iterable[str]) -> bool:
    """Whether a file has a tensor of one of some modules itself."""
    names = "\n".join(f".{name}" for name in stored if ".lora_" not in name)
    return any(f".{path}." in names for path in paths)


def portable_targets(targets: Iterable[str], others: Iterable[str]) -> set[str] | str:
    """Target modules for a file: names, or one expression where names would match other modules too.

    A target whose whole path is the end of another module's (``fc`` beside ``sub.fc``) has no name of its
    own, and readers that take expressions in a list for names understand an expression only by itself.

    Args:
        targets: Paths of the adapted modules.
        others: Paths of all other modules.

    Returns:
        The set of `shortest_names`, or an expression that matches the whole path of each target and no other.
    """
    paths, others = list(targets), set(others)
    names = set(shortest_names(paths, others))
    covered = {end for path in others for end in path_ends(path)}
    exact = sorted(names & covered)
    if not exact:
        return names
    free = "|".join(re.escape(name) for name in sorted(names - covered))
    parts = [rf"(?:.*\.)?(?:{free})"] if free else []
    return f"^(?:{'|'.join([*parts, *map(re.escape, exact)])})$"


def parents(path: str) -> list[str]:
    """The paths of the modules around one, the nearest first."""
    found = []
    while "." in path:
        path = path.rpartition(".")[0]
        found.append(path)
    return found


def _as_patterns(value: Iterable[str] | str | None, ordered: bool = False) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    return list(value) if ordered else sorted(set(value))


def _ends(paths: Iterable[str]) -> list[str]:
    """What can be suggested: the last one, two and three segments of paths, unless they hold a number."""
    found: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        for length in (1, 2, 3):
            end = parts[-length:]
            if len(end) == length and not any(part.isdigit() for part in end):
                found.setdefault(".".join(end).lower(), ".".join(end))
    return list(found.values())


def _words(pattern: str) -> list[str]:
    """What is looked up for a pattern: itself, or the names in an expression."""
    if not looks_like_regex(pattern):
        return [pattern.replace(" ", "_")]
    return re.findall(r"[A-Za-z_]\w{2,}", re.sub(r"\\[A-Za-z]", " ", pattern))


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _near(words: Iterable[str], names: Collection[str]) -> tuple[str, ...]:
    """The names most like any of the words, or that hold one but for its punctuation."""
    found: dict[str, None] = {}
    for word in [word for word in words if len(word) <= LONGEST][:SHOWN]:
        bare = _bare(word)
        within = [n for n in names if len(bare) > 2 and "." not in n and bare in _bare(n)]
        found.update(dict.fromkeys(name for name in (*nearest(word, names, 3), *within) if name != word))
    return tuple(found)[:5]


def _by_reason(refused: Iterable[Candidate]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for c in refused:
        groups.setdefault((c.type_name, c.reason), []).append(c.path)
    return [f"{listed(paths)} ({kind}): {reason}" for (kind, reason), paths in groups.items()]


def ranges(numbers: Sequence[int]) -> str:
    """Sorted whole numbers as text: ``0-3, 7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


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
