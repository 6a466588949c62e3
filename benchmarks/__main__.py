"""`python -m benchmarks [name …]`: run all benchmarks, or those named."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks
from benchmarks.harness import RESULTS, machine

NOT_BENCHMARKS = {"harness", "__main__"}


def names() -> list[str]:
    """Every module of the package that is a question."""
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg)
    return sorted(name for name in found if name not in NOT_BENCHMARKS)


def main() -> int:
    wanted = sys.argv[1:] or names()
    if unknown := sorted(set(wanted) - set(names())):
        print(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    for label, value in machine().items():
        print(f"{label}: {value}")
    missed = False
    for name in wanted:
        missed |= bool(importlib.import_module(f"benchmarks.{name}").main([]))
    print(f"\nWritten to {RESULTS}")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
