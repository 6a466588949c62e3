"""docs/trust.md names tests that exist."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatchcase

from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "trust.md"
NAMED = re.compile(r"`tests/(?P<file>[\w/]+\.py)(::(?P<test>[\w*]+))?`")


def test_every_promise_names_a_test() -> None:
    promises = re.findall(r"^- (.*?)(?=^- |^#|\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert promises
    assert [promise for promise in promises if NAMED.search(promise) is None] == []


def test_every_test_that_is_named_exists() -> None:
    missing = []
    for named in NAMED.finditer(PAGE.read_text(encoding="utf-8")):
        path, wanted = ROOT / "tests" / named["file"], named["test"] or "test_*"
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        there = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        missing += [] if any(fnmatchcase(name, wanted) for name in there) else [named[0]]
    assert missing == []
