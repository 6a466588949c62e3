"""What does a name of `veneer` cost beside `import torch`? Wall time and peak memory of fresh processes."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from benchmarks.harness import Ratio, alternate, ratio, report

PEAK = (
    "import resource, sys; peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
    "print(peak * (1 if sys.platform == 'darwin' else 1024))"
)


#: What brings a library in: `import veneer` alone imports nothing heavy, its first public name does.
IMPORTS = {"veneer": "from veneer import LoraConfig", "peft": "from peft import LoraConfig"}


def fresh_import(module: str) -> tuple[float, float]:
    """Seconds from start to end of a fresh interpreter that uses `module`, and its peak memory in MB."""
    statement = IMPORTS.get(module, f"import {module}")
    # An installed library has its bytecode: without it, what would be timed is the compiler.
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", f"{statement}; {PEAK}"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return time.perf_counter() - start, int(done.stdout) / 1e6


def compare(module: str, pairs: int) -> tuple[dict[str, Ratio], dict[str, str]]:
    """`module` against torch."""
    ours, torch = alternate(lambda: fresh_import(module), lambda: fresh_import("torch"), pairs=pairs)
    ratios = {
        f"import {module} ÷ import torch, wall": ratio([run[0] for run in ours], [run[0] for run in torch]),
        f"import {module} ÷ import torch, peak memory": ratio([r[1] for r in ours], [r[1] for r in torch]),
    }
    seconds = statistics.median(run[0] for run in ours), statistics.median(run[0] for run in torch)
    memory = statistics.median(run[1] for run in ours), statistics.median(run[1] for run in torch)
    details = {
        f"{module}, torch: seconds (median)": f"{seconds[0]:.2f}, {seconds[1]:.2f}",
        f"{module}, torch: MB (median)": f"{memory[0]:.0f}, {memory[1]:.0f}",
    }
    return ratios, details


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument(
        "--peer-pairs", type=int, default=3, help="pairs for the reference library, for scale"
    )
    options = parser.parse_args(arguments)
    ratios, details = compare("veneer", options.pairs)
    if options.peer_pairs:
        peer_ratios, peer_details = compare("peft", options.peer_pairs)
        ratios |= peer_ratios
        details |= peer_details
    report("import_time", __doc__.strip(), ratios, details)


if __name__ == "__main__":
    main()
