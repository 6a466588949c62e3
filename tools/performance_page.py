"""Write what `make bench` measured into docs/performance.md, and its pictures into docs/images."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- results: made by `python tools/performance_page.py` from what `make bench` wrote -->"
END = "<!-- end of results -->"
#: In the order of a model's life.
ORDER = (
    "training_step saved_for_backward plan_memory wrapping loading activating merging combining mixed_batch "
    "inference compiling import_time products"
).split()


def number(value: float) -> str:
    """Three figures."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def figure(found: Mapping[str, float]) -> str:
    """The median, and the quartiles where there are any."""
    if found["low"] == found["high"]:
        return number(found["median"])
    return f"{number(found['median'])} ({number(found['low'])}–{number(found['high'])})"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One benchmark's rows as Markdown."""
    others = list(dict.fromkeys(name for row in rows for name in row["beside"]))
    head = ["", "unit", "Veneer", "bar", *others]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        bar = row["at_most"]
        missed = bar is not None and row["ours"]["median"] > bar
        said = "" if bar is None else f"≤ {number(bar)}" + (" **missed**" if missed else "")
        more = [figure(row["beside"][name]) if name in row["beside"] else "" for name in others]
        label = row["label"].replace("|", "\\|")
        label = f"· {label.strip()}" if label.startswith(" ") else label
        lines.append([label, row["unit"] or "×", figure(row["ours"]), said, *more])
    return [f"| {' | '.join(line)} |" for line in lines]


def section(name: str) -> list[str]:
    """A benchmark: its question, its table, its conditions, its picture."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = [f"### {name}", "", found["question"], "", *table(found["rows"]), ""]
    lines += [f"- {label}: {value}" for label, value in found["conditions"].items()]
    if found["quick"]:
        lines.append("- measured with `--quick`: fewer turns")
    picture = RESULTS / f"{name}.png"
    if picture.is_file():
        shutil.copyfile(picture, IMAGES / f"bench-{name}.png")
        lines += ["", f"![{found['question']}](images/bench-{name}.png)"]
    return [*lines, ""]


def main() -> int:
    """Replace the part of the page between the marks."""
    present = [name for name in ORDER if (RESULTS / f"{name}.json").is_file()]
    if not present:
        print("nothing has been measured: run `make bench` first", file=sys.stderr)
        return 1
    machine = json.loads((RESULTS / f"{present[0]}.json").read_text(encoding="utf-8"))["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['system']}, Python {machine['python']}, {versions}."
    )
    made = [BEGIN, "", where, "", *(line for name in present for line in section(name)), END]
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    PAGE.write_text(before + "\n".join(made) + rest.split(END, 1)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
