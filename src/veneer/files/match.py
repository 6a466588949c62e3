"""Strict accounting of the tensors of a file against those that a model expects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from veneer.files.causes import likely_causes
from veneer.files.keys import MAGNITUDE, WRAPPERS, to_disk
from veneer.files.report import LoadReport, Shape

_CONTRAST = frozenset(
    "encoder decoder text vision visual image audio speech language unet prior 1 2 3".split()
)
_WITH_NAME = re.compile(
    r"\.(?:lora_[AB]|lora_magnitude_vector)\.([^.]+)\.(?:weight|bias)$|\.lora_embedding_[AB]\.([^.]+)$"
)


def match(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], *, optional: Iterable[str] = ()
) -> LoadReport:
    """Account for every tensor of a file.

    Keys that differ from the expected ones in an unambiguous way are re-mapped: wrappers' segments
    (``_orig_mod``), an adapter's name left in the key, an additional, missing or different prefix. The report
    says what was done; if two re-mappings are equally good, none is made.

    Args:
        expected: the model's names on disk -> shapes.
        found: the file's names -> shapes.
        optional: expected keys that a file may lack (an embedding's ``base_layer.weight``).
    """
    ours, theirs = ({k: tuple(v) for k, v in table.items()} for table in (expected, found))
    return _account(ours, theirs, frozenset(optional))


def _account(expected: dict[str, Shape], found: dict[str, Shape], optional: frozenset[str]) -> LoadReport:
    names, remarks = _normalise(expected, found)
    rewrite, prefix, ambiguous = _best_prefix(expected, {names[k]: found[k] for k in found})
    target = {k: rewrite(names[k]) for k in found}
    used = {k: e for k, e in target.items() if e in expected}
    mismatched = tuple((e, expected[e], found[k]) for k, e in used.items() if expected[e] != found[k])
    filled = set(used.values())
    missing = tuple(e for e in expected if e not in filled and e not in optional)
    report = LoadReport(
        renamed={k: e for k, e in used.items() if expected[e] == found[k]},
        missing=missing,
        unexpected=tuple(k for k in found if k not in used),
        mismatched=mismatched,
        prefix=prefix,
        remarks=remarks,
        ambiguous=ambiguous,
        found=len(found),
        expected=len(filled) + len(missing),
    )
    return report if report.ok else replace(report, causes=likely_causes(report))


def _normalise(
    expected: Mapping[str, Shape], found: Mapping[str, Shape]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names of the file in the spelling of this version, each step only if it keeps them distinct."""
    names = {k: k for k in found}
    remarks = []
    if all(k in expected for k in found):
        return names, ()
    kept = {part for k in expected for part in k.split(".")} & set(WRAPPERS)
    inside = {m[1] or m[2] for m in map(_WITH_NAME.search, found) if m}
    steps: list[tuple[str, Callable[[str], str]]] = [
        (
            "segments of wrappers (torch.compile, FSDP, checkpointing) were taken out of the keys",
            lambda k: ".".join(p for p in k.split(".") if p not in WRAPPERS or p in kept),
        ),
    ]
    if len(inside) == 1:
        (adapter,) = inside
        steps.append(
            (f"the adapter's name {adapter!r} was taken out of the keys", lambda k: to_disk(k, adapter))
        )
    steps.append(("the older name of DoRA's magnitude was accepted", _magnitude))
    for remark, step in steps:
        changed = {k: v if v in expected else step(v) for k, v in names.items()}
        if changed != names and len(set(changed.values())) == len(changed):
            names = changed
            remarks.append(remark)
    return names, tuple(remarks)


def _magnitude(key: str) -> str:
    return key.removesuffix(".weight") if key.endswith(f".{MAGNITUDE}.weight") else key


def _best_prefix(
    expected: Mapping[str, Shape], found: Mapping[str, Shape]
) -> tuple[Callable[[str], str], tuple[str, str] | None, tuple[tuple[str, str], ...]]:
    """The prefix re-mapping under which most of the file's keys are expected; none when that is not one."""

    def score(old: str, new: str) -> tuple[int, int]:
        table = {k: _rewrite(k, old, new, expected) for k in found}
        if len(set(table.values())) < len(table):
            return (0, 0)
        hits = [(k, e) for k, e in table.items() if e in expected]
        return len(hits), sum(expected[e] == found[k] for k, e in hits)

    plain = sum(k in expected for k in found)
    scores = {pair: score(*pair) for pair in _candidates(expected, found)} if plain < len(found) else {}
    best = max(scores.values(), default=(0, 0))
    if best[0] - plain <= (len(found) - plain) / 2:
        return (lambda k: k), None, ()
    winners = [pair for pair, value in scores.items() if value == best]
    if len(winners) > 1:
        return (lambda k: k), None, tuple(winners)
    old, new = winners[0]
    return (lambda k: _rewrite(k, old, new, expected)), (old, new), ()


def _rewrite(key: str, old: str, new: str, expected: Mapping[str, Shape]) -> str:
    """Replace the prefix `old` (empty or ending in a dot) by `new`, unless the key is expected as it is."""
    if key in expected or not key.startswith(old):
        return key
    return new + key[len(old) :]


def _candidates(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """Prefix pairs that map some of the file's keys onto expected ones, read off the data."""
    unknown = [k for k in found if k not in expected]
    probes = unknown[:: max(1, len(unknown) // 8)][:8]
    by_tail: dict[str, list[str]] = {}
    for e in expected:
        by_tail.setdefault(_tail(e), []).append(e)
    pairs: dict[tuple[str, str], None] = {}
    for probe in probes:
        for e in by_tail.get(_tail(probe), ()):
            pair = _align(probe.split("."), e.split("."))
            if pair:
                pairs[pair] = None
    return list(pairs)


def _tail(key: str) -> str:
    """The module's own name and what follows it: what a re-mapping never touches."""
    parts = key.split(".")
    own = 2 if len(parts) > 1 and parts[-2] in ("lora_A", "lora_B", "base_layer", "token_adapter") else 1
    return ".".join(parts[-own - 1 :])


def _align(old: list[str], new: list[str]) -> tuple[str, str] | None:
    """The differing prefixes of two names, in whole segments; None when they name different layers."""
    same = 0
    while same < min(len(old), len(new)) and old[-same - 1] == new[-same - 1]:
        same += 1
    head_old, head_new = old[: len(old) - same], new[: len(new) - same]
    numbers_old, numbers_new = ([p for p in head if p.isdigit()] for head in (head_old, head_new))
    if numbers_old and numbers_new and numbers_old != numbers_new:
        return None
    if not _is_part(head_old, head_new) and not _is_part(head_new, head_old):
        only_tail = same <= len(_tail(".".join(old)).split("."))
        named_old, named_new = _parts_named(head_old), _parts_named(head_new)
        if only_tail or (named_old and named_new and named_old != named_new):
            return None
    return ".".join([*head_old, ""]), ".".join([*head_new, ""])


def _parts_named(head: list[str]) -> frozenset[str]:
    """Words that tell the parts of a model apart: one must not be read as the other."""
    return _CONTRAST & {word for part in head for word in part.split("_")}


def _is_part(short: list[str], long: list[str]) -> bool:
    extra = len(long) - len(short)
    return extra >= 0 and any(long[:i] + long[i + extra :] == short for i in range(len(short) + 1))
