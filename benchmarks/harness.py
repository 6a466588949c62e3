"""What all benchmarks share: alternating runs, medians of the ratio, the machine, results on disk.

Two sides are measured in turns (A B A B …), and only ratios of neighbours are compared: absolute times of
different runs on a shared machine say little.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """Ours ÷ peer over alternating pairs."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} (quartiles {self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"


def ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """The median and quartiles of the ratios of neighbouring measurements."""
    each = sorted(a / b for a, b in zip(ours, peer, strict=True))
    low, median, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
    return Ratio(median, low, high, len(each))


def alternate(
    ours: Callable[[], Any], peer: Callable[[], Any], *, pairs: int, warm_up: int = 1
) -> tuple[list[Any], list[Any]]:
    """Call both in turns, the one that goes first changing with every pair; returns what they returned."""
    for _ in range(warm_up):
        ours()
        peer()
    mine: list[Any] = []
    theirs: list[Any] = []
    for number in range(pairs):
        turns = [(ours, mine), (peer, theirs)]
        for call, kept in turns if number % 2 == 0 else reversed(turns):
            kept.append(call())
    return mine, theirs


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """`call`, made to return its wall time in seconds."""

    def measured() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return measured


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
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def report(name: str, question: str, ratios: dict[str, Ratio], details: dict[str, Any]) -> Path:
    """Print the ratios and write benchmarks/results/<name>.json."""
    print(f"\n{name}: {question}")
    for label, value in ratios.items():
        print(f"  {label:<44} {value}")
    for label, value in details.items():
        print(f"  {label:<44} {value}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "name": name,
        "question": question,
        "machine": machine(),
        "ratios": {label: asdict(value) for label, value in ratios.items()},
        "details": details,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path
