"""Measure the source as it stands: ``python tools/structure.py`` prints the table of docs/architecture.md.

With ``--write`` the table on that page is replaced. Nothing here is a limit: the figures are signs, printed
so that drift is seen.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.architecture import import_rules  # noqa: E402

PACKAGE = ROOT / "src" / "veneer"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- table: made by `python tools/structure.py --write` -->", "<!-- end of table -->"
#: What is built on the library proper.
AROUND = {"training", "sweep", "integrations", "as_peft", "cli", "testing"}
#: One idea each: how to count the places where it is written.
IDEAS: dict[str, tuple[str, str]] = {
    "a suggestion (`difflib`)": (r"get_close_matches\(", "calls"),
    "the prefix `base_model.model.`": (r"[\"']base_model\.model\.", "literals"),
    "wrapper segments (`_orig_mod`)": (r"[\"']_orig_mod", "literals"),
    "moving a finished file into place": (r"os\.replace\(", "calls"),
    "counting stack frames for a warning": (r"stacklevel=", "calls"),
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> dict[str, str]:
    """The text of every source file, by its path below the package."""
    found = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in found}


def functions(text: str) -> Iterator[Function]:
    """All functions and methods of a file."""
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, Function))


def parameters(function: Function) -> int:
    """How many parameters a caller can give, without ``self`` and ``cls``."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return sum(name not in ("self", "cls") for name in names)


def lines_of(function: Function) -> int:
    """Lines of the body, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return 0 if not body else (function.end_lineno or 0) - body[0].lineno + 1


def methods_of_a_layer() -> tuple[int, int]:
    """Methods that `LoraLinear` has beyond `torch.nn.Module`, and the files they stand in."""
    from veneer.layers.linear import LoraLinear

    own = [cls for cls in LoraLinear.__mro__ if cls.__module__.startswith("veneer.")]
    kinds = (staticmethod, classmethod, property)
    names = {n for c in own for n, v in vars(c).items() if inspect.isfunction(v) or isinstance(v, kinds)}
    return len(names), len({inspect.getsourcefile(cls) for cls in own})


def rows() -> list[tuple[str, str]]:
    """Each measure and its figure."""
    sources = files()
    lines = {name: text.count("\n") for name, text in sources.items()}
    core = sum(n for name, n in lines.items() if Path(name).parts[0] not in AROUND)
    defined = [function for text in sources.values() for function in functions(text)]
    short = [f for f in defined if ast.get_docstring(f) and lines_of(f) <= 2]
    long = [f for f in defined if (f.end_lineno or 0) - f.lineno >= 40]
    methods, places = methods_of_a_layer()
    circles = import_rules.circles(PACKAGE)
    table = [
        ("lines: all, the core", f"{sum(lines.values()):,}, {core:,}"),
        ("files", str(len(lines))),
        ("imports against the direction, circles between files",
         f"{len(import_rules.check(PACKAGE))}, {len(circles)}"),
        ("methods of `LoraLinear`, and the files they stand in", f"{methods}, {places}"),
        ("functions with 8 or more parameters", str(sum(parameters(f) >= 8 for f in defined))),
        ("functions of more than 40 lines", str(len(long))),
        ("docstrings on bodies of up to two lines", str(len(short))),
    ]  # fmt: skip
    for idea, (pattern, unit) in IDEAS.items():
        count = sum(len(re.findall(pattern, text)) for text in sources.values())
        table.append((f"{idea}: {unit}", str(count)))
    return table


def rooms() -> list[tuple[str, str]]:
    """Lines of each unit right under the package, largest first."""
    count: Counter[str] = Counter()
    for name, text in files().items():
        count[Path(name).parts[0].removesuffix(".py")] += text.count("\n")
    return [(f"`{unit}`", f"{lines:,}") for unit, lines in count.most_common()]


def as_table(head: tuple[str, str], body: list[tuple[str, str]]) -> str:
    """Markdown of two columns."""
    return "\n".join(f"| {a} | {b} |" for a, b in (head, ("---", "---:"), *body))


def page(text: str, render: Callable[[], str]) -> str:
    """The page with a new table in it."""
    between = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    return between.sub(lambda _: f"{BEGIN}\n{render()}\n{END}", text)


def main() -> int:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table of docs/architecture.md")
    write = parser.parse_args().write

    def render() -> str:
        return "\n\n".join((as_table(("measure", "today"), rows()), as_table(("unit", "lines"), rooms())))

    if write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), render), encoding="utf-8")
    else:
        print(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
