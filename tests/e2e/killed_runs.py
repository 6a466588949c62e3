"""A program: train, be killed at some of the steps on disk, go on. It prints how many steps there are."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.kills import done, killed_at, steps_of
from tests.unit.training.test_run import ROWS, TOKENIZER, adapted
from veneer import TrainingError
from veneer.training import TrainOptions, train

#: The learning rate is not at zero in the end: a step too many would be seen in the adapter.
HOW: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 4, "lr_scheduler_type": "constant"}


def run(output: Path, **more: Any) -> None:
    """An epoch has four steps."""
    options = TrainOptions(**HOW, max_steps=6, save_steps=2, **more)
    train(adapted(dropout=0.1), TOKENIZER, ROWS, output, options, eval_rows=ROWS[:4])


def main(root: Path, every: int) -> None:
    run(root / "whole")
    count = steps_of(lambda: run(root / "counted"), root / "counted")
    for step in {*range(every, count, every), count}:
        output = root / str(step)
        killed_at(step, partial(run, output), output)
        done(partial(_go_on, output))
    print(count)


def _go_on(output: Path) -> None:
    try:
        run(output, resume=True)
    except TrainingError as error:
        assert "nothing to resume" in str(error)
        run(output, overwrite_output_dir=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
