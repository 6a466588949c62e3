"""Write what `make bench` measured into docs/performance.md, and its pictures into docs/images.

A benchmark without a result here keeps the section that the page has.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.pop(0)  # here, examples.py would hide the folder examples
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import ROOT, Report, Row, short, stored

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
BEGIN = "<!-- results: made by `python tools/performance_page.py` from what `make bench` wrote -->"
END = "<!-- end of results -->"
#: In the order of a model's life.
ORDER = (
    "training_step training_run saved_for_backward plan_memory wrapping loading activating merging combining "
    "extracting mixed_batch family sweep mail_sweep evaluation experts expert_layouts inference compiling "
    "import_time products"
).split()


def table(rows: Sequence[Row]) -> list[str]:
    """One benchmark's rows as Markdown."""
    others = list(dict.fromkeys(name for row in rows for name in row.beside))
    head = ["", "unit", "Veneer", "bar", *others]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        bar = "" if row.at_most is None else f"≤ {short(row.at_most)}" + " **missed**" * row.missed
        more = [str(row.beside[name]) if name in row.beside else "" for name in others]
        label = f"· {row.label.strip()}" if row.label.startswith(" ") else row.label
        lines.append([label, row.unit or "×", str(row.ours), bar, *more])
    return [f"| {' | '.join(line)} |" for line in lines]


def in_words(value: object) -> str:
    """A condition of a benchmark as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: `{said}`" for name, said in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def place(machine: Mapping[str, Any]) -> str:
    """Where a benchmark ran, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['system']}, Python {machine['python']}, {versions}."
    )


def sections_of(results: str) -> tuple[str, dict[str, list[str]]]:
    """Of the results on the page: where they were measured, and the lines of each section by its name."""
    head, *parts = re.split(r"^(?=### )", results, flags=re.MULTILINE)
    return head.strip(), {part.splitlines()[0].removeprefix("### "): part.splitlines() for part in parts}


def section(name: str, found: Mapping[str, Any], where: str) -> list[str]:
    """A benchmark: its question, its table, its conditions, its picture; and its machine if it is another."""
    report: Report = found["report"]
    lines = [f"### {name}", "", report.question, "", *table(report.rows), ""]
    lines += [f"- {label}: {in_words(value)}" for label, value in report.conditions.items()]
    if (own := place(found["machine"])) != where:
        lines.append(f"- measured on: {own}")
    if found["quick"]:
        lines.append("- measured with `--quick`: fewer turns")
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "draw"):
        module.draw(report, IMAGES / f"bench-{name}.png")
        lines += ["", f"![{report.question}](images/bench-{name}.png)"]
    return [*lines, ""]


def main() -> int:
    """Replace the part of the page between the marks."""
    results = {name: found for name in ORDER if (found := stored(name)) is not None}
    if not results:
        print("nothing has been measured: run `make bench` first", file=sys.stderr)
        return 1
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN, 1)
    there, after = rest.split(END, 1)
    where, kept = sections_of(there)
    if results.keys() >= kept.keys():
        where = place(next(iter(results.values()))["machine"])
    made = {**kept, **{name: section(name, found, where) for name, found in results.items()}}
    lines = [line for name in ORDER if name in made for line in made[name]]
    PAGE.write_text(before + "\n".join([BEGIN, "", where, "", *lines, END]) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
