"""Try broken and hostile input for some time.

    python -m tests.fuzz [--seconds 60] [--seed N] [--case N] [--of DOOR ...]

Prints how many cases of each kind were done and refused. For a case that failed, which is neither: what is
wrong, and where its files are kept. Exit 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import tests.conftest  # noqa: F401  # offline, one thread
from tests.fuzz.cases import DISKS, Case, Outcome, drawn, tried
from tests.fuzz.doors import DOORS, Door, Inputs
from tests.fuzz.inputs import KINDS
from tests.fuzz.materials import make
from tests.kills import done, ended, forked
from veneer import VeneerError

KEPT = Path(__file__).parents[2] / "build" / "fuzz"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int, help="try this one alone, and keep its files")
    parser.add_argument("--of", nargs="+", choices=DOORS, default=list(DOORS), metavar="DOOR")
    asked = parser.parse_args()
    doors = {name: DOORS[name] for name in asked.of}
    found: Counter[tuple[str, str]] = Counter()
    broken: list[tuple[Case, Outcome]] = []
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        good = Path(folder) / "good"
        good.mkdir()
        done(lambda: make(good))
        if asked.case is None:
            _import_what_doors_need(doors, good)
        end, number = time.monotonic() + asked.seconds, asked.case or 0
        while asked.case is not None or time.monotonic() < end:
            case, place = drawn(asked.seed, number, doors), Path(folder) / "case"
            outcome = tried(case, good, place)
            found[case.kind, outcome.word] += 1
            if outcome.word == "failed" or asked.case is not None:
                broken += [(case, outcome)] if outcome.word == "failed" else []
                _keep(place, case)
                print(
                    f"case {number}: {case.kind} of {case.of or 'nothing'}, {case.door}: {' '.join(outcome)}",
                    flush=True,
                )
            shutil.rmtree(place)
            number += 1
            if asked.case is not None:
                break
    _show(found, asked.seed)
    same = f" --of {shlex.join(asked.of)}" if len(doors) < len(DOORS) else ""
    for case, _ in broken:
        print(f"again: python -m tests.fuzz --seed {case.seed} --case {case.number}{same}")
        print(f"its files: {_kept(case)}")
    return 1 if broken else 0


def _import_what_doors_need(doors: Mapping[str, Door], good: Path) -> None:
    """Import what the doors import, so that each case finds it there."""
    reading, writing = os.pipe()

    def enter() -> None:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(0, 2)
        for name, door in doors.items():
            with contextlib.suppress(VeneerError):
                door.enter(Inputs(good, good / (door.of or ("adapter",))[0], good / name))
        with os.fdopen(writing, "w") as told:
            told.write("\n".join(sys.modules))

    child = forked(enter)
    os.close(writing)
    with os.fdopen(reading) as told:
        names = told.read().split()
    assert ended(child) == 0, "good input fails"
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _kept(case: Case) -> Path:
    return KEPT / f"{case.seed}-{case.number}"


def _keep(place: Path, case: Case) -> None:
    shutil.rmtree(_kept(case), ignore_errors=True)
    shutil.move(place, _kept(case))
    place.mkdir()


def _show(found: Counter[tuple[str, str]], seed: int) -> None:
    words = ("done", "refused", "failed")
    print(f"{'input':<22}{''.join(f'{word:>9}' for word in words)}")
    for kind in (*KINDS, *DISKS):
        print(f"{kind:<22}{''.join(f'{found[kind, word]:>9,}' for word in words)}")
    sums = [sum(count for (_, outcome), count in found.items() if outcome == word) for word in words]
    print(f"{'all':<22}{''.join(f'{count:>9,}' for count in sums)}\nseed {seed}")


if __name__ == "__main__":
    raise SystemExit(main())
