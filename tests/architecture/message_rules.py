"""How messages name options: as a `Hint`, never as the text of one face, read from the syntax trees.

1. No flag of the command line stands in a string outside ``cli/``; docstrings are for readers of the code.
2. No option that a command has a flag for stands in the text of an error or a warning as Python spells it.
3. A command prints by the functions of `cli.common` and `cli.messages` alone: they let no terminal obey what
   a file names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

#: Beginnings of whole command lines: of other programs, whose flags may be called as ours are, and of ours.
COMMAND_LINES = (
    "mlx_lm.", "llama-server ", "python -m vllm.", "python convert_lora_to_gguf.py ", "`veneer merge ",
)  # fmt: skip


def flags_in(tree: ast.Module, flags: Collection[str]) -> Iterator[tuple[int, str]]:
    """(line, flag) of each of these flags in a string that is no docstring."""
    for node in _strings(tree):
        if not node.value.startswith(COMMAND_LINES):
            for found in re.findall(r"(?<![\w-])--[a-z][\w-]*", node.value):
                if found in flags:
                    yield node.lineno, found


def options_in(tree: ast.Module, options: Collection[str]) -> Iterator[tuple[int, str]]:
    """(line, option) of each of these options in the text of a message."""
    for call in _messages(tree):
        for node in _strings(call):
            yield from ((node.lineno, option) for option in spelt_in_python(node.value, options))


def spelt_in_python(text: str, options: Collection[str]) -> list[str]:
    """The options of these that a text names as Python does.

    A name of several words is an option wherever it stands alone, outside quotes and paths; one of a single
    word where a value follows. What follows ``--grid`` is written so on the command line.
    """
    text = re.sub(r"--grid \S+", "", text)
    found = re.findall(r"(?<![\w.\-'\"/`])([a-z]\w*)(?:(=)|(?![\w\-/'\"]))", text)
    return [name for name, sign in found if name in options and ("_" in name or sign)]


def _messages(tree: ast.Module) -> Iterator[ast.AST]:
    """What is raised, warned of, or made a `Text`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            yield node
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("warn", "Text"):
                yield node


def _strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """The texts under a node: no docstrings, and none that a `Hint` is made of."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Constant):
            if isinstance(child.value, str) and not isinstance(tree, ast.Expr):
                yield child
        elif not (isinstance(child, ast.Call) and getattr(child.func, "id", "") == "Hint"):
            yield from _strings(child)


def sources(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """(path, tree) of every file of the library outside the command line."""
    for file in sorted(package.rglob("*.py")):
        where = file.relative_to(package)
        if where.parts[0] != "cli":
            yield where.as_posix(), ast.parse(file.read_text())


def prints_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that writes to a terminal by itself: ``print``, and what is rich's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "Console", "Text"):
            yield node.lineno, node.func.id  # type: ignore[attr-defined]
