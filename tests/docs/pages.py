"""Markdown pages as programs: find the fenced blocks of a page and run its Python in one namespace."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S
)
_ANNOUNCED = re.compile(r"<!--\s*warns:\s*(?P<pattern>.+?)\s*-->")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the words after it, its text, its first line in the page."""

    page: str
    language: str
    marks: tuple[str, ...]
    code: str
    line: int
    follows_directly: bool

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of `page`, in order.

    `follows_directly` is true when only white space lies between a block and the one before it.
    """
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        indent = len(match["indent"])
        code = "".join(
            line[indent:] if line.strip() else line for line in match["code"].splitlines(keepends=True)
        )
        found.append(
            Block(
                page=page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name,
                language=language,
                marks=tuple(marks),
                code=code,
                line=text.count("\n", 0, match.start("code")) + 1,
                follows_directly=bool(found) and not text[end : match.start()].strip(),
            )
        )
        end = match.end()
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks, for checks of links and of commands named in the text."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def announced_warnings(page: Path) -> list[str]:
    """Regular expressions of the warnings a page says it causes: `<!-- warns: REGEX -->`."""
    return [match["pattern"] for match in _ANNOUNCED.finditer(page.read_text(encoding="utf-8"))]


def run_page(page: Path) -> None:
    """Execute the Python blocks of `page` in order, in one namespace, in the current directory.

    A `text` block right after a Python block is that block's output; `...` in it stands for anything.
    What a page announces as a warning must come; other warnings meet the filters in force (errors in pytest).
    """
    # As a module of that name, so that classes of a page can be pickled.
    module = sys.modules["__page__"] = types.ModuleType("__page__")
    namespace: dict[str, object] = vars(module)
    checker = doctest.OutputChecker()
    announced = announced_warnings(page)
    with warnings.catch_warnings(record=True) as seen:
        for pattern in announced:
            warnings.filterwarnings("always", message=f"(?s).*{pattern}")
        printed: str | None = None
        for block in blocks(page):
            if block.language == "python" and "no-run" not in block.marks:
                printed = _execute(block, namespace)
            elif block.language == "text" and block.follows_directly and printed is not None:
                want, got = _trimmed(block.code), _trimmed(printed)
                if not checker.check_output(want, got, doctest.ELLIPSIS):
                    raise AssertionError(
                        f"{block.name} shows another output than its code prints.\n"
                        f"Shown:\n{want}\nPrinted:\n{got}"
                    )
                printed = None
            else:
                printed = None
    messages = [str(warning.message) for warning in seen]
    silent = [p for p in announced if not any(re.search(p, message, re.S) for message in messages)]
    if silent:
        raise AssertionError(f"{page.name} announces warnings that did not come: {silent}; seen: {messages}")


def _execute(block: Block, namespace: dict[str, object]) -> str:
    output = io.StringIO()
    padded = "\n" * (block.line - 1) + block.code
    code = compile(padded, str(ROOT / block.page), "exec", dont_inherit=True)
    with contextlib.redirect_stdout(output):
        exec(code, namespace)
    return output.getvalue()


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"
