"""`python -m benchmarks [name …]`: run all benchmarks, or those named.

`--quick` takes fewer turns, for a first look. `--check` measures only what has no result of this code yet,
and exits 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time

import benchmarks
from benchmarks.harness import RESULTS, machine, read, table, write

NOT_BENCHMARKS = {"harness", "__main__"}


def names() -> list[str]:
    """Every module of the package that answers a question."""
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg)
    return sorted(name for name in found if name not in NOT_BENCHMARKS and not name.startswith("_"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of: {', '.join(names())}")
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar is missed")
    options = parser.parse_args()
    wanted = options.names or names()
    if unknown := sorted(set(wanted) - set(names())):
        print(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    for label, value in machine().items():
        print(f"{label}: {value}")
    missed = []
    for name in wanted:
        module = importlib.import_module(f"benchmarks.{name}")
        start = time.perf_counter()
        report = read(name) if options.check else None
        how = "measured before, with this code"
        if report is None:
            report = module.measure(options.quick)
            write(name, report, quick=options.quick)
            how = f"{time.perf_counter() - start:.0f} s"
        print(f"\n{name} ({how})\n  {report.question}\n{table(report)}", flush=True)
        if hasattr(module, "draw"):
            module.draw(report, RESULTS / f"{name}.png")
        missed += [f"{name}: {row.label}" for row in report.rows if row.missed]
    print(f"\nWritten to {RESULTS}")
    if missed:
        print("Bars missed:\n" + "\n".join(f"  {line}" for line in missed))
    return int(bool(missed) and options.check)


if __name__ == "__main__":
    raise SystemExit(main())
