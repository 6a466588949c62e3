"""What all benchmarks share: alternating runs, medians of ratios, bars, fresh processes, results on disk.

A benchmark is a module of this package with `measure(quick) -> Report`, and `draw(report, path)` where it has
a picture. Its docstring begins with the question that it answers. Sides are measured in turns (A B C, B C A,
…) in one process, and only figures of one turn are divided by one another: absolute times of different runs
on a shared machine say little.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: Threads that torch computes with, in every benchmark.
THREADS = 2


@dataclass(frozen=True)
class Figure:
    """A median and its quartiles: of ratios of neighbouring measurements, or of plain values."""

    median: float
    low: float
    high: float
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Median and quartiles of what was measured."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median, low, high, len(values))

    @classmethod
    def exact(cls, value: float) -> Figure:
        """Something that is counted and does not vary."""
        return cls(value, value, value)

    def __str__(self) -> str:
        if self.low == self.high:
            return short(self.median)
        return f"{short(self.median)} ({short(self.low)}–{short(self.high)})"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        label: What was measured.
        ours: Veneer's figure; lower is better.
        unit: Of the figures; empty for a ratio.
        at_most: The bar: above it, `--check` fails.
        aim: What we would like.
        beside: The same figure of others, by their name.
    """

    label: str
    ours: Figure
    unit: str = ""
    at_most: float | None = None
    aim: float | None = None
    beside: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def missed(self) -> bool:
        """Whether there is a bar, and the median is above it."""
        return self.at_most is not None and self.ours.median > self.at_most


@dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
        question: What it asked.
        rows: The table.
        conditions: Shapes, dtypes, threads: what a reader needs to measure the same again.
    """

    question: str
    rows: Sequence[Row]
    conditions: Mapping[str, Any] = field(default_factory=dict)


def question(module_doc: str | None) -> str:
    """The first paragraph of a benchmark's docstring, in one line."""
    return " ".join((module_doc or "").strip().split("\n\n")[0].split())


def ratio(ours: Sequence[float], peer: Sequence[float]) -> Figure:
    """Ours ÷ peer, turn by turn."""
    return Figure.of([a / b for a, b in zip(ours, peer, strict=True)])


def take_turns(
    sides: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Measure every side once a round, in an order that rotates; what each returned, by side."""
    names = list(sides)
    for _ in range(warm_up):
        for name in names:
            sides[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(sides[name]())
    return found


def timed(call: Callable[[], Any], *, times: int = 1) -> Callable[[], float]:
    """`call`, made to return its wall time in seconds: the mean of so many calls in a row."""

    def measured() -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    return measured


def in_fresh_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """What a module-level function of a benchmark returns, as JSON, in a process of its own.

    Raises:
        RuntimeError: The process failed; with the end of what it said.
    """
    program = (
        f"import json, sys; from {function.__module__} import {function.__name__} as f; "
        "print(json.dumps(f(**json.loads(sys.argv[1]))))"
    )
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, json.dumps(arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{function.__name__}({arguments}) failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory(field: str) -> int:
    """What Linux says of this process, in bytes: memory now (VmRSS) or at its highest (VmHWM).

    A child's ru_maxrss begins at its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def machine() -> dict[str, Any]:
    """The processor, its count, the system, and the versions that matter."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        name = next(lines, f": {name}").partition(":")[2].strip()
    versions = {}
    for package in ("torch", "safetensors", "transformers", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def source_state() -> str:
    """A digest of the library's and the benchmarks' code: a result tells by it whether it is of this code."""
    digest = hashlib.sha256()
    for folder in ("src", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def write(name: str, report: Report, *, quick: bool) -> Path:
    """Write benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "name": name,
        "question": report.question,
        "quick": quick,
        "machine": machine(),
        "source": source_state(),
        "conditions": report.conditions,
        "rows": [asdict(row) for row in report.rows],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def stored(name: str) -> dict[str, Any] | None:
    """What `write` wrote, with a `Report` under "report"; None where there is nothing."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    rows = [
        Row(**{**row, "ours": Figure(**row["ours"]), "beside": _figures(row["beside"])})
        for row in content["rows"]
    ]
    return {**content, "report": Report(content["question"], rows, content["conditions"])}


def read(name: str) -> Report | None:
    """The result on disk, where there is one of this code that was not a quick one."""
    content = stored(name)
    if content is None or content["quick"] or content["source"] != source_state():
        return None
    report: Report = content["report"]
    return report


def table(report: Report) -> str:
    """The report as lines for a terminal: the table, where there is one, and the conditions."""
    others = list(dict.fromkeys(name for row in report.rows for name in row.beside))
    head = ["", "unit", "veneer", "at most", "aim", "", *others]
    lines = [head]
    for row in report.rows:
        bar, aim = ("" if v is None else short(v) for v in (row.at_most, row.aim))
        verdict = "" if row.at_most is None else "MISSED" if row.missed else "met"
        more = [str(row.beside[name]) if name in row.beside else "" for name in others]
        lines.append([row.label, row.unit or "×", str(row.ours), bar, aim, verdict, *more])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    said = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if not report.rows:
        said = []
    said += [f"{label}: {value}" for label, value in report.conditions.items()]
    return "\n".join(f"  {line.rstrip()}" for line in said)


def _figures(content: Mapping[str, Any]) -> dict[str, Figure]:
    return {name: Figure(**figure) for name, figure in content.items()}


def short(value: float) -> str:
    """Three figures."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
