"""A program: sweep, be killed at some of the steps on disk, go on. It prints how many steps there are."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.kills import done, killed_at, steps_of
from tests.unit.training.tiny import saved_records, saved_tiny
from veneer import TrainingError
from veneer.sweep import sweep as module
from veneer.sweep.options import SweepOptions

GRID = {"learning_rate": [1e-3, 1e-2, 3e-2]}


def run(root: Path, output: Path, resume: bool = False) -> None:
    """Three configurations, of which one comes to its sixth step."""
    data = str(root / "data.jsonl")
    options = SweepOptions(model=str(root / "base"), data=data, eval_data=data, output=str(output))
    module.SAVE_SECONDS = 0.0
    module.sweep(replace(options, max_steps=6, batch_size=4, lora_dropout=0.1, resume=resume), GRID)


def main(root: Path, every: int) -> None:
    saved_tiny(root / "base")
    saved_records(root / "data.jsonl")
    run(root, root / "whole")
    count = steps_of(partial(run, root, root / "counted"), root / "counted")
    for step in {*range(every, count, every), count}:
        output = root / str(step)
        killed_at(step, partial(run, root, output), output)
        done(partial(_go_on, root, output))
    print(count)


def _go_on(root: Path, output: Path) -> None:
    try:
        run(root, output, resume=True)
    except TrainingError as error:
        assert "nothing to resume" in str(error)
        shutil.rmtree(output)
        run(root, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
