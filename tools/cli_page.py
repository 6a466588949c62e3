"""Write docs/cli.md from the commands themselves; with ``--check`` only say whether it is current."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import made_page
from made_page import ROOT

PAGE = ROOT / "docs" / "cli.md"
HEAD = """\
<!-- Made by `python tools/cli_page.py` from the commands themselves; edits here are lost. -->

# The command line

`veneer` (or `python -m veneer`) has one command for each step of an adapter's life.
`--help` prints the same as this page.

Flags may be written with dashes or underscores. `--verbose` may be anywhere on the line; it shows
tracebacks and the warnings of all libraries. Results go to standard output, progress and messages to
standard error. `--json` prints the result as one JSON document. Output is coloured only on a terminal, and
not if `NO_COLOR` is set.

| exit code | |
|---|---|
| 0 | done |
| 1 | failed: the message says what went wrong, why, and what to do; nothing half-written is left |
| 2 | wrong usage: an unknown command or flag, or an invalid value |
| 130 | interrupted by Ctrl-C |

| command | |
|---|---|
{index}
"""


def page() -> str:
    """The whole page."""
    import typer

    from veneer.cli.common import app, register_commands

    register_commands()
    group: Any = typer.main.get_command(app)
    commands = dict(sorted(group.commands.items()))
    index = "\n".join(
        f"| [`veneer {name}`](#veneer-{name}) | {_summary(c)} |" for name, c in commands.items()
    )
    parts = [HEAD.format(index=index)]
    parts += [_command(name, command) for name, command in commands.items()]
    return "\n".join(parts)


def _summary(command: Any) -> str:
    return _line(inspect.cleandoc(command.help or "").split("\n\n")[0])


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    needed = [f"{p.opts[0]} {_value(p)}" for p in options if p.required]
    words = [_argument(p) for p in arguments] + needed + ["[OPTIONS]"]
    out = [f"## veneer {name}\n", f"```text\nveneer {name} {' '.join(words)}\n```\n"]
    out.append(_paragraphs(command.help or "") + "\n")
    if any(_help(p) for p in arguments):
        out += ["| argument | |", "|---|---|"]
        out += [f"| `{_argument(p)}` | {_help(p)} |" for p in arguments]
        out.append("")
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "", []).append(option)
    for panel, members in panels.items():
        if panel:
            out.append(f"**{panel}**\n")
        out += ["| flag | default | |", "|---|---|---|"]
        out += [f"| {_flags(p)} | {_default(p)} | {_help(p)} |" for p in members]
        out.append("")
    return "\n".join(out)


def _paragraphs(text: str) -> str:
    blocks = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(_line(block) for block in blocks)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    name = name.strip("[]")
    return name if parameter.required else f"[{name}]"


def _flags(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts) if name.startswith("--"))
    return names if option.is_flag else f"{names} `{_value(option)}`"


def _value(option: Any) -> str:
    if option.metavar:
        return str(option.metavar)
    described = getattr(option, "type_descriptor", None)
    words = str(described.annotation if described is not None else option.type).lower()
    for kind, shown in (("int", "N"), ("float", "X"), ("path", "PATH")):
        if kind in words:
            return shown
    return "TEXT"


def _default(option: Any) -> str:
    default = option.default
    if option.required:
        return "required"
    if callable(default) or default is None or default is False or default == ():
        return ""
    return "on" if default is True else f"`{default}`"


def _help(parameter: Any) -> str:
    return _line(getattr(parameter, "help", None) or "")


def _line(text: str) -> str:
    """One line that is safe in a table: what looks like a tag or a column stays text."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(made_page.main(__doc__, page, PAGE))
