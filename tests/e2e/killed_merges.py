"""A program: merge over another model and be killed, at each step on disk. It prints the count of steps."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.kills import killed_at, steps_of
from tests.unit.training.test_merge_files import adapter_of, base_of
from veneer.training.adapters import load_adapted, save_merged
from veneer.training.merge_files import merge_files


def from_file_to_file(adapter: Path, base: Path, place: Path) -> None:
    merge_files(adapter, base, place, overwrite=True)


def in_memory(adapter: Path, base: Path, place: Path) -> None:
    save_merged(*load_adapted(adapter, str(base)), place, overwrite=True)


WAYS = {"files": from_file_to_file, "memory": in_memory}


def main(root: Path, way: Callable[[Path, Path, Path], None]) -> None:
    # Shards of the same names, so that a mixture of them would load.
    bases = [base_of(root / f"base-{seed}", seed=seed, max_shard_size="20KB") for seed in (0, 1)]
    adapters = [adapter_of(base, root / f"adapter-{seed}") for seed, base in enumerate(bases)]
    merge_files(adapters[0], bases[0], root / "old")
    (root / "old" / "notes.txt").write_text("mine")
    work = partial(way, adapters[1], bases[1])
    shutil.copytree(root / "old", root / "new" / "out")
    count = steps_of(partial(work, root / "new" / "out"), root / "new")
    for step in range(1, count + 1):
        place = root / str(step)
        shutil.copytree(root / "old", place / "out")
        killed_at(step, partial(work, place / "out"), place)
    print(count)


if __name__ == "__main__":
    main(Path(sys.argv[1]), WAYS[sys.argv[2]])
