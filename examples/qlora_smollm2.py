"""QLoRA: SmolLM2-135M learns to read mail headers over weights of 4 bits, beside the same run over 16 bits.

``python examples/qlora_smollm2.py`` takes some ten minutes on two quiet CPU cores. It prints the memory of
the base, the exact answers on held-out mails before and after training, and what merging costs. It exits with
1 if the 4-bit run answers more than ten percentage points fewer mails than the 16-bit run. How far it is
stands on standard error; Ctrl-C ends it and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from veneer import LoraConfig, PeftModel, VeneerWarning, get_peft_model, prepare_model_for_kbit_training
from veneer.integrations.kbit import model_bytes
from veneer.training import demo
from veneer.training.data import encode
from veneer.training.demo import OPTIONS, RANK, Examiner, Score, mails, record_of
from veneer.training.loop import train
from veneer.training.models import demo_model, load_base
from veneer.training.progress import Progress, Terminal

#: Twice the demo's: over four bits the base starts from a higher loss, and needs longer to the same answers.
STEPS = 2 * demo.STEPS


def run(
    quantize: str | None, count: int, steps: int, folder: Path, progress: Progress
) -> tuple[Score, Score, int]:
    """Load, examine, train, examine: the two scores, and the bytes of the base."""
    started = time.monotonic()
    progress.say(f"{quantize or 'bf16'}: examine, train {steps} steps, examine")
    model, tokenizer = load_base(demo_model(), "bfloat16", quantize=quantize)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    size = model_bytes(model)
    parts = mails()
    examiner = Examiner(tokenizer, parts["heldout"][:count], progress)
    count = len(examiner.mails)
    before = examiner.examine(model)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    rows = encode([record_of(mail) for mail in parts["train"]], tokenizer).rows
    train(adapted, tokenizer, rows, folder, replace(OPTIONS, max_steps=steps), progress)
    after = examiner.examine(adapted)
    print(
        f"{quantize or 'bf16'}: base {size / 1e6:.0f} MB; exact answers {before.exact}/{count} before, "
        f"{after.exact}/{count} after {steps} steps; loss {before.loss:.3f} -> {after.loss:.3f}; "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    say_what_merging_costs(adapted, "codes again" if quantize else "16 bits")
    return before, after, size


def say_what_merging_costs(adapted: PeftModel, kind: str) -> None:
    """Merge as the weights are stored, take it back, and merge into ordinary weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # that much is lost is what is printed here
        print(f"  into {kind}: {adapted.merge_adapter()}")
        adapted.unmerge_adapter()
        for dtype in (torch.bfloat16, torch.float32):
            if kind != "16 bits":
                twin = copy.deepcopy(adapted)
                twin.merge_and_unload(dequantize=dtype)
                print(f"  into {dtype}: {twin.base_model.merge_report}", flush=True)


def main() -> int:
    """Both runs, and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mails", type=int, default=48, help="held-out mails that are answered")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    options = parser.parse_args()
    progress = Terminal()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            kind: run(kind, options.mails, options.steps, Path(folder) / str(kind), progress)
            for kind in (None, "nf4")
        }
    wide, narrow = results[None][1].exact, results["nf4"][1].exact
    gap = 100 * (wide - narrow) / len(results["nf4"][1].answers)
    print(
        f"nf4 takes {results['nf4'][2] / results[None][2]:.0%} of the bytes; exact answers: {-gap:+.1f} "
        "percentage points"
    )
    return 0 if gap <= 10 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was kept")
