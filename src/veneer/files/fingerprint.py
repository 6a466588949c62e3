"""A fingerprint of the base model in the adapter, so that a wrong base of the same shape is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from veneer.files.match import match

WEIGHTS = 16
#: Weights that are not adapted: where an adapter brings its own embedding along, only they tell.
OTHERS = 4
POSITIONS = 16
MAX_BYTES = 4000
NOTE_ABOVE = 0.02
#: What 4 bits may cost: nf4 is off by some 9 % of a weight's norm, 4-bit integers in groups of 128 by 15 %.
QUANTISED_BELOW = 0.25
WRONG_ABOVE = 0.5

Severity = Literal["none", "note", "wrong"]


@dataclass(frozen=True)
class BaseComparison:
    """How the present base model compares with the one that an adapter was made on.

    Attributes:
        problems: what differs, in words.
        severity: ``"none"``, ``"note"`` (quantised, trained further, resized vocabulary) or ``"wrong"``.
        difference: relative L2 difference of the sampled weights; None when none could be compared.
        compared: number of weights that were compared.
    """

    problems: tuple[str, ...]
    severity: Severity
    difference: float | None = None
    compared: int = 0


def fingerprint(
    architecture: str | None,
    vocab_size: int | None,
    weights: Mapping[str, torch.Tensor | Callable[[], torch.Tensor]],
    storages: Collection[str] = (),
    *,
    others: Mapping[str, torch.Tensor | Callable[[], torch.Tensor]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Describe a base model in less than 4 KB of JSON.

    Of up to 16 adapted weights and 4 others, spread over their mappings, 16 values each at positions that
    depend on the shape only, to three digits: the same for fp32, fp16 and bf16 copies. Integer, sharded and
    meta weights are skipped.

    Args:
        architecture: class name of the base model.
        vocab_size: its vocabulary size.
        weights: module path -> base weight, of the adapted modules, in model order; of a quantised one, what
            reads it.
        storages: names of the quantised storages among them.
        others: module path -> base weight, of modules that are not adapted.
        sizes: of the architecture, such as the number of its layers.
    """
    samples, beside = _samples(weights, WEIGHTS), _samples(others or {}, OTHERS)
    result: dict[str, Any] = {
        "version": 1,
        "architecture": architecture,
        "vocab_size": vocab_size,
        "weights": len(weights),
        "samples": samples,
    }
    if storages:
        result["quantised"] = sorted(storages)
    if sizes:
        result["sizes"] = dict(sizes)
    if beside:
        result["others"] = beside
    while len(json.dumps(result)) > MAX_BYTES and (samples or beside):  # very long names
        (samples or beside).popitem()
    return result


def _samples(
    weights: Mapping[str, torch.Tensor | Callable[[], torch.Tensor]], most: int
) -> dict[str, dict[str, Any]]:
    usable = [k for k, w in weights.items() if _readable(w)]
    count = min(most, len(usable))
    return {k: _described(weights[k]) for k in (usable[i * len(usable) // count] for i in range(count))}


def _described(weight: torch.Tensor | Callable[[], torch.Tensor]) -> dict[str, Any]:
    tensor = weight if isinstance(weight, torch.Tensor) else weight()
    return {"shape": list(tensor.shape), "values": _sample(tensor)}


def _readable(weight: torch.Tensor | Callable[[], torch.Tensor]) -> bool:
    if not isinstance(weight, torch.Tensor):
        return True
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    return (
        plain
        and not weight.is_meta
        and weight.is_floating_point()
        and weight.element_size() > 1
        and weight.numel() > 0
    )


@torch.no_grad()
def _sample(weight: torch.Tensor) -> list[float | None]:
    # An odd stride through the flattened weight visits rows and columns alike.
    flat = [(i * 2654435761 + 12345) % weight.numel() for i in range(POSITIONS)]
    index = []
    for size in reversed(weight.shape):
        index.append(torch.tensor([f % size for f in flat], device=weight.device))
        flat = [f // size for f in flat]
    values = weight[tuple(reversed(index))] if index else weight.expand(POSITIONS)
    rounded = values.to(torch.bfloat16).tolist()
    return [float(f"{v:.3g}") if math.isfinite(v) else None for v in rounded]


def compare_fingerprints(saved: Mapping[str, Any], present: Mapping[str, Any]) -> BaseComparison:
    """Compare the fingerprint in an adapter with that of the model it is loaded on.

    Class names are not compared by themselves: the same base has several (with and without a head).
    """
    try:
        return _compare(saved, present)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as exc:
        return BaseComparison(
            (f"the fingerprint of the base model is not readable ({type(exc).__name__}: {exc})",), "note"
        )


def _compare(saved: Mapping[str, Any], present: Mapping[str, Any]) -> BaseComparison:
    others: Mapping[str, Any] = saved.get("others", {})
    theirs = {**saved["samples"], **others}
    ours = {**present["samples"], **present.get("others", {})}
    pairs = match({k: v["shape"] for k, v in ours.items()}, {k: v["shape"] for k, v in theirs.items()})
    vocabularies = saved.get("vocab_size"), present.get("vocab_size")
    problems: list[str] = []
    severity: Severity = "none"
    now_of = present.get("sizes", {})
    sizes = [(k, n, now_of[k]) for k, n in saved.get("sizes", {}).items() if k in now_of and now_of[k] != n]
    if sizes:
        words = ", ".join(f"{k} was {n} and is {now}" for k, n, now in sizes)
        problems.append(f"the architecture has other sizes: {words}{_classes(saved, present)}")
        severity = "wrong"
    shapes = [(k, e, f) for k, e, f in pairs.mismatched if not _resized(e, f, vocabularies)]
    if shapes:
        k, e, f = shapes[0]
        problems.append(
            f"{len(shapes)} weights have another shape: {k} had {f}, has {e} here{_classes(saved, present)}"
        )
        severity = "wrong"
    # Each group by itself: a base may share the adapted weights with the right one, and nothing else.
    groups = (_values(group, ours, pairs.renamed) for group in (saved["samples"], others))
    found = [difference for values in groups if (difference := _difference(values)) is not None]
    difference = max(found, default=None)
    quantised = saved.get("quantised") or present.get("quantised")
    tolerated = QUANTISED_BELOW if quantised else NOTE_ABOVE
    if difference is not None and difference > WRONG_ABOVE:
        problems.append(
            f"sampled weights differ by {difference:.0%}: another base model{_classes(saved, present)}"
        )
        severity = "wrong"
    elif difference is not None and difference > tolerated:
        problems.append(f"sampled weights differ by {difference:.1%}: quantised, or trained further")
        severity = "note" if severity == "none" else severity
    before, now = vocabularies
    if isinstance(before, int) and isinstance(now, int) and before != now:
        problems.append(f"the vocabulary had {before} entries, here it has {now}")
        same_weights = difference is not None and difference <= NOTE_ABOVE
        vocabulary: Severity = "note" if now > before or same_weights else "wrong"
        severity = vocabulary if severity == "none" or vocabulary == "wrong" else severity
    return BaseComparison(tuple(problems), severity, difference, len(pairs.renamed))


def _values(
    saved: Mapping[str, Any], present: Mapping[str, Any], renamed: Mapping[str, str]
) -> list[tuple[float, float]]:
    """Pairs of sampled values, saved and present, of the tensors that have both."""
    return [
        (a, b)
        for key, name in renamed.items()
        if key in saved
        for a, b in zip(saved[key]["values"], present[name]["values"], strict=True)
        if a is not None and b is not None
    ]


def _classes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    a, b = saved.get("architecture"), present.get("architecture")
    return f" ({a} then, {b} now)" if a and b and a != b else ""


def _resized(expected: tuple[int, ...], found: tuple[int, ...], vocabularies: tuple[Any, Any]) -> bool:
    return expected[1:] == found[1:] and expected[:1] != found[:1] and vocabularies == (found[0], expected[0])


def _difference(pairs: list[tuple[float, float]]) -> float | None:
    size = math.sqrt(sum(float(a) ** 2 for a, _ in pairs))
    if not pairs or size == 0:
        return None
    return math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in pairs)) / size
