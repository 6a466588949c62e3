"""The comparison finds every kind of difference, and takes rounding for nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from veneer.errors import ExportError
from veneer.integrations.export.source import Update
from veneer.integrations.export.verifying import compare


def one() -> Update:
    return Update(torch.randn(2, 6), torch.randn(4, 2), 1.5, bias=torch.randn(4), magnitude=torch.rand(4))


def test_the_same_in_other_words_is_exact() -> None:
    meant = one()
    padded = replace(
        meant,
        a=torch.cat([meant.a, torch.zeros(1, 6)]),
        b=torch.cat([meant.b * 2, torch.zeros(4, 1)], 1),
        scaling=0.75,
        bias=None if meant.bias is None else meant.bias * 2,
    )
    assert compare({"m": meant}, {"m": padded})["m"].exact
    assert compare({"m": meant}, {"m": replace(meant, embedding=None)})["m"].exact


def test_one_rounding_is_told_from_two() -> None:
    meant = one()
    rounded = replace(meant, b=meant.b.bfloat16(), a=meant.a.bfloat16())
    found = compare({"m": meant}, {"m": rounded})["m"]
    assert not found.exact and 0 < found.error < torch.finfo(torch.bfloat16).eps
    off = rounded.b.clone()
    off[1, 1] = torch.nextafter(off[1, 1], torch.tensor(9.0, dtype=torch.bfloat16))
    off[1, 1] = torch.nextafter(off[1, 1], torch.tensor(9.0, dtype=torch.bfloat16))
    with pytest.raises(ExportError, match="its values differ"):
        compare({"m": meant}, {"m": replace(rounded, b=off)})


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] *= 1 + 1e-5
    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda u: replace(u, a=nudged(u.a)), "values differ"),
        (lambda u: replace(u, b=nudged(u.b)), "values differ"),
        (lambda u: replace(u, bias=nudged(u.bias)), "values differ"),
        (lambda u: replace(u, magnitude=nudged(u.magnitude)), "values differ"),
        (lambda u: replace(u, b=u.b * float("nan")), "values differ"),
        (lambda u: replace(u, scaling=1.5001), "values differ"),
        (lambda u: replace(u, bias=None), "is missing, or there is one too many"),
        (lambda u: replace(u, magnitude=None), "is missing, or there is one too many"),
        (lambda u: replace(u, embedding=True), "mistaken for a linear layer"),
        (lambda u: replace(u, a=u.a[:1], b=u.b[:, :1]), "shapes"),
        (lambda u: replace(u, a=u.a[:, :5]), "shapes"),
        (lambda u: replace(u, a=torch.cat([u.a, u.a]), b=torch.cat([u.b, u.b], 1)), "not zero"),
    ],
)
def test_every_difference_is_found(change: object, words: str) -> None:
    meant = one()
    assert callable(change)
    with pytest.raises(ExportError, match=words):
        compare({"m": meant}, {"m": change(meant)})


def test_modules_that_are_missing_or_too_many() -> None:
    with pytest.raises(ExportError, match=r"a is missing, c should not be there"):
        compare({"a": one(), "b": (b := one())}, {"b": b, "c": one()})
