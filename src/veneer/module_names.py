"""Names of modules in an adapter's configuration, as PEFT reads them.

A name stands for modules whose path ends in it. What one takes is `by_ends`; which names a file needs so that
PEFT takes the same modules is `portable_targets` and `portable_saved`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from veneer.config.expressions import Paths, path_ends
from veneer.config.values import name_in, show
from veneer.errors import Hint, Text
from veneer.spec import PatternSet
from veneer.wording import listed


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


def _any_stored(paths: Iterable[str], stored: Iterable[str]) -> bool:
    names = "\n".join(f".{name}" for name in stored if ".lora_" not in name)
    return any(f".{path}." in names for path in paths)


def saved_modules(names: Iterable[str]) -> PatternSet:
    """The patterns of ``modules_to_save``: a name is the end of a path, with a dot before it or not."""
    return PatternSet(names, "modules_to_save", inside=True)


def portable_saved(named: Iterable[str], saved: Collection[str], paths: Iterable[str]) -> list[str]:
    """Names that mean in a file exactly the modules that train in full, to PEFT too.

    Args:
        named: The names and expressions in the configuration; those that do are kept.
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
        if hits and around(path, saved) is None:
            wrong.update(hits)
    clean = {name for index, name in enumerate(candidates) if index not in wrong}
    result = [name for name in named if name in clean]
    for path, hits in saved_modules(result).over(Paths(sorted(saved))).items():
        if not hits:
            end = path.rpartition(".")[2]
            result.append(end if end in clean else path)
    return list(dict.fromkeys(result))


def portable_targets(targets: Iterable[str], others: Iterable[str]) -> set[str] | str:
    """Target modules for a file: names, or one expression where names would match other modules too.

    A target whose whole path is the end of another module's (``fc`` beside ``sub.fc``) has no name of its
    own, and readers that take expressions in a list for names understand an expression only by itself.

    Args:
        targets: Paths of the adapted modules.
        others: Paths of all other modules.

    Returns:
        For each target the shortest end of its path that no other module's path has; or one expression that
        matches the whole path of each target and no other.
    """
    covered = {end for path in others for end in path_ends(path)}
    names: set[str] = set()
    exact: set[str] = set()
    for path in targets:
        free = [end for end in path_ends(path) if end not in covered]
        names.update(free[-1:])
        exact.update(() if free else (path,))
    if not exact:
        return names
    ends = "|".join(re.escape(name) for name in sorted(names))
    parts = [rf"(?:.*\.)?(?:{ends})"] if ends else []
    return f"^(?:{'|'.join([*parts, *map(re.escape, sorted(exact))])})$"


def parents(path: str) -> list[str]:
    """The paths of the modules around one, the nearest first."""
    found = []
    while "." in path:
        path = path.rpartition(".")[0]
        found.append(path)
    return found


def around(path: str, paths: Collection[str]) -> str | None:
    """Which of the paths is this one, or that of a module around it; the nearest."""
    return next((outer for outer in (path, *parents(path)) if outer in paths), None)
