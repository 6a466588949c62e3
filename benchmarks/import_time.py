"""What does importing veneer cost beside `import torch`? Wall time and peak memory of fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.harness import Figure, Report, Row, question, ratio, take_turns

#: A child's ru_maxrss begins at its parent's, so Linux is asked for the highest of this process alone.
PEAK = (
    "import pathlib; status = pathlib.Path('/proc/self/status').read_text(); "
    "print(1024 * int(status.partition('VmHWM:')[2].split()[0]))"
)
#: What brings a library in: `import veneer` alone imports nothing heavy, its first public name does.
IMPORTS = {
    "veneer": "from veneer import LoraConfig, get_peft_model",
    "torch": "import torch",
    "PEFT": "from peft import LoraConfig, get_peft_model",
}


def fresh_import(statement: str) -> tuple[float, float]:
    """Seconds from start to end of a fresh interpreter that imports, and its peak memory in MB."""
    # An installed library has its bytecode: without it, what would be timed is the compiler.
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", f"{statement}; {PEAK}"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return time.perf_counter() - start, int(done.stdout) / 1e6


def measure(quick: bool) -> Report:
    memory: dict[str, list[float]] = {name: [] for name in IMPORTS}

    def one(name: str) -> float:
        seconds, megabytes = fresh_import(IMPORTS[name])
        memory[name].append(megabytes)
        return seconds

    seconds = take_turns({name: (lambda name=name: one(name)) for name in IMPORTS}, rounds=3 if quick else 5)
    beyond = {name: [a - b for a, b in zip(memory[name], memory["torch"], strict=True)] for name in memory}
    rows = [
        Row(
            "wall time ÷ import torch",
            ratio(seconds["veneer"], seconds["torch"]),
            at_most=1.1,
            beside={"PEFT": ratio(seconds["PEFT"], seconds["torch"])},
        ),
        Row(
            "peak memory beyond torch's",
            Figure.of(beyond["veneer"]),
            "MB",
            at_most=10,
            beside={"PEFT": Figure.of(beyond["PEFT"])},
        ),
    ]
    absolute = {
        f"{name}: seconds, MB": f"{Figure.of(seconds[name])}, {Figure.of(memory[name])}" for name in IMPORTS
    }
    return Report(question(__doc__), rows, {"imports": IMPORTS, **absolute})
