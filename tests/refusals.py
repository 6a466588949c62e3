"""Every refusal is raised by some test: what a run of all tests never raised is listed, and fails the run.

A refusal is a place in the sources that makes one of Veneer's errors. A `raise` of what a function makes
(``raise _explain(error)``) is one too, beside the errors that the function makes. Problems that are gathered
in a list and raised together are one refusal.

The errors are watched in all processes, see `on_start/sitecustomize.py`. A run of some of the tests is not
watched, and one in which a test failed is not judged.
"""

from __future__ import annotations

import ast
import os
import runpy
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ON_START = Path(__file__).resolve().parent / "on_start"
#: Options of pytest with which a run leaves out tests.
PARTIAL = (
    "keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "collectonly", "setuponly",
    "setupplan",
)  # fmt: skip


class Refusal(NamedTuple):
    """One place that refuses: lines of a file, the function around it, and its first line."""

    file: Path
    line: int
    end: int
    function: str
    text: str
    computed: bool


def error_classes(trees: Iterable[ast.Module]) -> set[str]:
    """Names of VeneerError and of all classes that inherit from it."""
    bases = {
        node.name: {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"VeneerError"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def refusals(source: Path) -> list[Refusal]:
    """All refusals of the sources below a directory."""
    texts = {file: file.read_text() for file in sorted(source.rglob("*.py"))}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    errors = error_classes(trees.values())
    return [
        Refusal(file, node.lineno, node.end_lineno or node.lineno, function, line.strip(), computed)
        for file, tree in trees.items()
        for node, function, computed in _refusing(tree, errors)
        for line in [texts[file].splitlines()[node.lineno - 1]]
    ]


def _refusing(tree: ast.Module, errors: set[str]) -> Iterator[tuple[ast.expr | ast.stmt, str, bool]]:
    def visit(node: ast.AST, function: str) -> Iterator[tuple[ast.expr | ast.stmt, str, bool]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        elif isinstance(node, ast.Call) and _name(node.func) in errors:
            yield node, function, False
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = _name(node.exc.func)
            if not name[:1].isupper():
                yield node, function, True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    return visit(tree, "")


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


class Seen(NamedTuple):
    """A line that made an error, or led to the one that did."""

    kind: str
    file: str
    line: int


def seen_in(directory: Path) -> set[Seen]:
    """What the processes have noted."""
    found = set()
    for note in directory.rglob("*-*"):
        kind, _, line = note.name.partition("-")
        if kind in ("made", "led") and note.is_file():
            found.add(Seen(kind, f"/{note.parent.relative_to(directory).as_posix()}", int(line)))
    return found


def never_raised(wanted: Iterable[Refusal], seen: Iterable[Seen]) -> list[Refusal]:
    """The refusals that no line stands for."""
    lines: dict[tuple[str, str], set[int]] = {}
    for one in seen:
        lines.setdefault((one.kind, one.file), set()).add(one.line)

    def raised(one: Refusal) -> bool:
        kinds = ("made", "led") if one.computed else ("made",)
        found = set().union(*(lines.get((kind, str(one.file)), ()) for kind in kinds))
        return not found.isdisjoint(range(one.line, one.end + 1))

    return [one for one in wanted if not raised(one)]


def register(config: pytest.Config, source: Path = ROOT / "src") -> None:
    """Let the law judge a run of all tests; workers inherit the watching from what starts them."""
    if not hasattr(config, "workerinput") and _is_whole(config):
        config.pluginmanager.register(Law(source))


def _is_whole(config: pytest.Config) -> bool:
    everything = [Path(config.rootpath, path) for path in config.getini("testpaths")]
    asked = [Path(config.invocation_params.dir, path) for path in config.args]
    return asked == everything and not any(config.getoption(name, None) for name in PARTIAL)


class Law:
    """The plugin: watches from the start of a session, judges at its end.

    Args:
        source: Directory of the sources.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.missing: list[Refusal] = []
        self.directory = tempfile.TemporaryDirectory(prefix="refusals")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ON_START), *([before] if before else [])])
        os.environ["VENEER_REFUSALS"] = self.directory.name
        runpy.run_path(str(ON_START / "sitecustomize.py"))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that passed without raising every refusal."""
        if session.exitstatus == pytest.ExitCode.OK:
            self.missing = never_raised(refusals(self.source), seen_in(Path(self.directory.name)))
            if self.missing:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List what was never raised."""
        if self.missing:
            terminalreporter.section("refusals that no test raises")
        for one in self.missing:
            place = f"{one.file.relative_to(self.source.parent)}:{one.line}"
            terminalreporter.write_line(f"never raised: {place} {one.function}: {one.text}")
