"""Run the examples, one after another: ``python tools/examples.py [NAME …] [--short]``.

Each prints what it finds and writes it to examples/results. Ends with what each took; exit status 1 if one
of them failed or one of its claims did not hold.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def programs() -> dict[str, Path]:
    """The files of examples/ that can be run, by name; the others are what they share."""
    found = sorted(EXAMPLES.glob("*.py"))
    return {path.stem: path for path in found if '__name__ == "__main__"' in path.read_text("utf-8")}


def main() -> int:
    known = programs()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all without a name")
    parser.add_argument("--short", action="store_true", help="the small form of each, which tests run too")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"no such example: {', '.join(unknown)}; there are {', '.join(known)}")
    took: dict[str, tuple[float, int]] = {}
    for name in given.names or known:
        print(f"\n=== {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-W", "ignore", str(known[name]), *(["--short"] if given.short else [])]
        try:
            code = subprocess.call(command)
        except KeyboardInterrupt:
            return 130
        took[name] = time.perf_counter() - start, code
    print("\n=== all")
    for name, (seconds, code) in took.items():
        print(f"{name:24}{seconds:7.0f} s  {'held' if code == 0 else f'FAILED (exit status {code})'}")
    print(f"{'together':24}{sum(seconds for seconds, _ in took.values()):7.0f} s")
    return int(any(code for _, code in took.values()))


if __name__ == "__main__":
    sys.exit(main())
