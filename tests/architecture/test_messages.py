"""Messages name options as a `Hint`: in the package, and in small texts that break each rule."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import typer

from tests.architecture import message_rules
from veneer.cli import common

PACKAGE = Path(__file__).parents[2] / "src" / "veneer"


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option that some command has a flag for."""
    common.register_commands()
    group = typer.main.get_command(common.app)
    return {name for command in group.commands for name in common.flags_of(command)}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def library() -> list[tuple[str, ast.Module]]:
    return list(message_rules.sources(PACKAGE))


def test_the_library_names_no_flag_of_the_command_line(
    options: set[str], library: list[tuple[str, ast.Module]]
) -> None:
    flags = {f"--{name.replace('_', '-')}" for name in options}
    assert {"--untie", "--lora-r"} <= flags
    found = [
        f"{where}:{line}: {flag}"
        for where, tree in library
        for line, flag in message_rules.flags_in(tree, flags)
    ]
    assert not found, "\n".join(found)


def test_no_message_spells_an_option_that_has_a_flag(
    options: set[str], library: list[tuple[str, ast.Module]]
) -> None:
    found = [
        f"{where}:{line}: {name}"
        for where, tree in library
        for line, name in message_rules.options_in(tree, options)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('x = "go on with --resume"', ["--resume"]),
        ('x = f"go on with --resume, {y}"', ["--resume"]),
        ('"""Docstring with --resume."""', []),
        ('x = "mlx_lm.generate --resume"', []),
        ('x = "a--resume --resumed"', []),
    ],
)
def test_flags_are_found(text: str, found: list[str]) -> None:
    assert [flag for _, flag in message_rules.flags_in(ast.parse(text), {"--resume"})] == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('raise E(f"lora_alpha is {x}")', ["lora_alpha"]),
        ('raise E("use r=8")', ["r"]),
        ('warn("untie=True does")', ["untie"]),
        ('x.append(Text("lora_alpha must"))', ["lora_alpha"]),
        ('raise E("no r, \'lora_alpha\' or a/lora_alpha.b", Hint("lora_alpha"))', []),
        ('x = "lora_alpha is no message"', []),
    ],
)
def test_options_are_found(text: str, found: list[str]) -> None:
    named = message_rules.options_in(ast.parse(text), {"lora_alpha", "r", "untie"})
    assert sorted({name for _, name in named}) == found


def test_commands_print_by_what_is_shared() -> None:
    shared = {"__init__.py", "common.py", "messages.py"}
    found = [
        f"{file.name}:{line}: {name}"
        for file in sorted((PACKAGE / "cli").glob("*.py"))
        if file.name not in shared
        for line, name in message_rules.prints_in(ast.parse(file.read_text()))
    ]
    assert not found, "\n".join(found)


def test_prints_are_found() -> None:
    tree = ast.parse("print(1)\nconsole.print(2)\nshow(3)\nConsole().print(4)\nt.add_row(Text('x'))")
    assert sorted(name for _, name in message_rules.prints_in(tree)) == ["Console", "Text", "print"]
