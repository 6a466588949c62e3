"""Names of modules in an adapter's configuration."""

from __future__ import annotations

import re

import pytest

from veneer.config.expressions import Paths
from veneer.module_names import around, by_ends, portable_saved, portable_targets
from veneer.spec import PatternSet


@pytest.mark.parametrize(
    ("targets", "others"),
    [
        (["lin"], ["a", "a.lin"]),
        (["lin", "b.up", "c.up"], ["a", "b", "c", "a.lin"]),
        (["a.lin", "x-y", "b.up"], ["z", "z.a", "z.a.lin", "aXlin", "z.x-y", "b", "lin"]),
        (["fc", "sub.fc"], ["sub"]),
    ],
)
def test_portable_targets_match_the_targets_and_nothing_else(targets: list[str], others: list[str]) -> None:
    written = portable_targets(targets, others)
    paths = [*targets, *others]
    if isinstance(written, str):
        assert [p for p in paths if re.fullmatch(written, p)] == targets  # as the field reads a lone string
    patterns = PatternSet([written] if isinstance(written, str) else written, "target_modules")
    hits = patterns.over(Paths(paths))
    assert [p for p in paths if hits[p]] == targets


def test_portable_targets_are_names_where_names_can_tell() -> None:
    assert portable_targets(["a.up", "b.up"], ["a", "b", "a.down"]) == {"up"}


PATHS = ["head", "sub", "sub.head", "xhead", "xhead.norm"]


def test_a_name_takes_every_path_that_ends_in_it() -> None:
    hits, remarks = by_ends(["head", "sub"], "modules_to_save", Paths(PATHS), PATHS)
    assert {path: found for path, found in hits.items() if found} == {
        "head": [0],
        "sub": [1],
        "sub.head": [0],
        "xhead": [0],
    }
    assert list(remarks) == [0] and "xhead too. For head and 1 more alone" in str(remarks[0])


@pytest.mark.parametrize(("tensor", "taken"), [("head.weight", False), ("xhead.weight", True)])
def test_a_file_without_tensors_of_a_longer_name_does_not_mean_it(tensor: str, taken: bool) -> None:
    hits, remarks = by_ends(["head"], "modules_to_save", Paths(PATHS), PATHS, [tensor])
    assert bool(hits["xhead"]) is bool(remarks) is taken


def test_saved_modules_get_names_that_mean_no_other() -> None:
    assert portable_saved(["head"], ["head", "sub.head", "xhead"], PATHS) == ["head"]
    assert portable_saved(["head"], ["sub.head"], PATHS) == ["sub.head"]
    assert portable_saved([".*norm"], ["xhead.norm"], PATHS) == ["norm"]
    assert portable_saved([], [], PATHS) == []


def test_the_nearest_module_around_a_path() -> None:
    assert around("a.b.c", {"a", "a.b"}) == "a.b" and around("a", {"a"}) == "a"
    assert around("a.b", {"b", "ab"}) is None
