"""What does it cost to evaluate eight adapters of one base together, beside one of them?

The rows are short ones of a multiple-choice test: a question, and one token of an answer that counts. One
adapter is measured beside its base in two passes; eight are measured in mixed batches that hold the base too.
They have 4.5 times the tokens, so where the batch of one adapter fills the machine already, as on a CPU, no
order of computing is far below that; the aim is for machines that it does not fill.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._models import LINEARS, adapted, llama
from benchmarks.harness import THREADS, Report, Row, question, ratio, take_turns, timed

RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
HIDDEN, LAYERS, VOCABULARY = 576, 8, 1024
ROWS, SHORTEST, LONGEST = 16, 12, 28
#: Of eight adapters ÷ one.
AIM = 2.5
#: As `veneer eval --max-length`.
MAX_LENGTH = 1024


def model(dtype: torch.dtype) -> Any:
    from veneer import LoraConfig

    made = adapted("veneer", llama(HIDDEN, LAYERS, dtype, head=True, vocabulary=VOCABULARY), r=RANKS[0])
    for number, r in enumerate(RANKS[1:], 2):
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEARS, init_lora_weights=False)
        made.add_adapter(str(number), config)
    return made.eval()


def choices() -> list[dict[str, list[int]]]:
    draw = random.Random(0)
    rows = []
    for _ in range(ROWS):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randint(SHORTEST, LONGEST))]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]})
    return rows


def sides(made: Any, batch_size: int) -> dict[str, Callable[[], float]]:
    from veneer.routing import BASE
    from veneer.training import Collator, answer_loss
    from veneer.training.evaluate import answer_losses

    rows, collator, names = choices(), Collator(0), list(made.peft_config)

    def one() -> None:
        with made.disable_adapter():
            answer_loss(made, rows, collator, batch_size)
        answer_loss(made, rows, collator, batch_size)

    def by_turns() -> None:
        with made.disable_adapter():
            answer_loss(made, rows, collator, batch_size)
        for name in names:
            made.set_adapter(name, inference_mode=True)
            answer_loss(made, rows, collator, batch_size)
        made.set_adapter(names[0], inference_mode=True)

    def together() -> None:
        answer_losses(made, rows, collator, [BASE, *names], batch_size, most=batch_size * MAX_LENGTH)

    return {"one": timed(one), "together": timed(together), "turns": timed(by_turns)}


def measure(quick: bool) -> Report:
    torch.set_num_threads(THREADS)
    found: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        made = model(dtype)
        for batch_size in (1, 8):
            times = take_turns(sides(made, batch_size), rounds=2 if quick else 7)
            what = f"{str(dtype).removeprefix('torch.')}, {batch_size} rows in a batch"
            together, one = times["together"], times["one"]
            by_turns = ratio(times["turns"], one)
            label = f"{what}: eight adapters ÷ one"
            found.append(Row(label, ratio(together, one), aim=AIM, beside={"by turns": by_turns}))
    conditions = {
        "model": f"Llama-shaped, hidden {HIDDEN}, {LAYERS} layers",
        "adapters": f"eight, of ranks {', '.join(map(str, RANKS))}, on every linear",
        "rows": f"{ROWS}, of {SHORTEST} to {LONGEST} tokens, each with one token that counts",
    }
    return Report(question(__doc__), found, conditions)


def draw(report: Report, path: Path) -> None:
    from benchmarks._pictures import bars

    groups = {
        row.label.partition(":")[0]: {"together": row.ours, "by turns": row.beside["by turns"]}
        for row in report.rows
    }
    bars(path, groups, "Evaluating eight adapters, as a multiple of one", floor=1.0)
