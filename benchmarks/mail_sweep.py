"""How long does `veneer sweep` take on real mails, and does it find the whole grid's best learning rate?

SmolLM2-135M on the mails of the demo, with the grid of ``examples/configs/sweep.yaml`` and from the command
line, as a user starts it: with early stopping, and the whole grid. Minutes include loading everything.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Figure, Report, Row, question
from examples.data import headers, record_of, smollm2
from veneer.sweep.trial import short

FILE = ROOT / "examples" / "configs" / "sweep.yaml"
#: What we would like it to take, on two cores.
MINUTES = 10


def swept(place: Path, *flags: str) -> tuple[dict[str, Any], float]:
    """What a sweep found, and how many minutes it took."""
    output, begun = place / "".join(("sweep", *flags)), time.perf_counter()
    paths = {"model": smollm2(), "data": place / "train.jsonl", "eval-data": place / "heldout.jsonl"}
    given = [word for name, path in {**paths, "output": output}.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-W", "ignore", "-m", "veneer", "sweep", str(FILE), *given, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "sweep.json").read_text()), (time.perf_counter() - begun) / 60


def told(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={short(value)}" for name, value in values.items())


def measure(quick: bool) -> Report:
    flags = ["--max-steps", "3"] * quick
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for part in ("train", "heldout"):
            lines = [json.dumps(record_of(mail)) + "\n" for mail in headers()[part]]
            (place / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        early, minutes = swept(place, *flags)
        full, whole = swept(place, "--no-early-stop", *flags)
    known = {str(one["values"]): one["mean"] for one in full["configurations"]}
    chosen, best = (found["configurations"][0]["values"] for found in (early, full))
    missed = chosen["learning_rate"] != best["learning_rate"]
    above = 100 * (known[str(chosen)] / known[str(best)] - 1)
    share = {what: count / full["tokens"][what] for what, count in early["tokens"].items()}
    rows = [
        Row("veneer sweep", Figure.exact(minutes), "min", aim=MINUTES),
        Row("  the whole grid", Figure.exact(whole), "min"),
        Row("tokens trained ÷ those of the whole grid", Figure.exact(share["training"])),
        Row("  held-out tokens ÷ those of the whole grid", Figure.exact(share["evaluation"])),
        Row("learning rates other than the whole grid's best", Figure.exact(missed), "of 1", at_most=0),
        Row("  held-out loss above the best one's", Figure.exact(above), "%"),
    ]
    both = {"veneer sweep": early, "the whole grid": full}
    conditions = {
        "grid": "; ".join(f"{name} {', '.join(map(short, v))}" for name, v in full["grid"].items()),
        "the best": f"{told(chosen)}; of the whole grid, {told(best)}",
    }
    for name, found in both.items():
        spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in found["seconds"].items())
        conditions[f"seconds of {name}"] = spent
    return Report(question(__doc__), rows, conditions)
