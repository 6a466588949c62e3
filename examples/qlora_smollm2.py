"""QLoRA: SmolLM2-135M learns to read mail headers over weights of 4 bits, beside the same run over 16 bits.

Prints the memory of the base, the loss on held-out mails before and after training, how many answers are then
exact, and what merging costs. One seed: the two runs differ in nothing but the bits of the base.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import data
import demo
import torch
from demo import OPTIONS, RANK, Examiner, Score
from side_by_side import Study, run

from veneer import LoraConfig, PeftModel, VeneerWarning, get_peft_model, prepare_model_for_kbit_training
from veneer.integrations.kbit import model_bytes
from veneer.training import encode, load_base, train

#: More than the demo's: over four bits the base starts from a higher loss, and needs longer.
STEPS = 3 * demo.STEPS // 2


def learn(
    study: Study, quantize: str | None, count: int, steps: int, folder: Path
) -> tuple[float, Score, int]:
    """Load, train, examine: the loss before, the score after, and the bytes of the base."""
    started, progress = time.monotonic(), study.progress
    progress.say(f"{quantize or 'bf16'}: train {steps} steps, examine")
    model, tokenizer = load_base(data.smollm2(), "bfloat16", quantize=quantize)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    size = model_bytes(model)
    parts = data.headers()
    # The short form answers with a few tokens only: it looks at the loss.
    words = 4 if study.short else demo.MAX_NEW_TOKENS
    examiner = Examiner(tokenizer, parts["heldout"][:count], progress, words)
    count = len(examiner.mails)
    before = examiner.loss(model)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    rows = encode([data.record_of(mail) for mail in parts["train"]], tokenizer).rows
    options = replace(OPTIONS, max_steps=steps, batch_size=2 if study.short else OPTIONS.batch_size)
    train(adapted, tokenizer, rows, folder, options, progress)
    after = examiner.examine(adapted)
    study.show(
        f"{quantize or 'bf16'}: base {size / 1e6:.0f} MB; loss {before:.3f} -> {after.loss:.3f} in {steps} "
        f"steps;\n  exact answers {after.exact}/{count}; {time.monotonic() - started:.0f} s"
    )
    say_what_merging_costs(study, adapted, "codes again" if quantize else "16 bits")
    return before, after, size


def say_what_merging_costs(study: Study, adapted: PeftModel, kind: str) -> None:
    """Merge as the weights are stored, take it back, and merge into ordinary weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # that much is lost is what is printed here
        study.show(f"  into {kind}: {adapted.merge_adapter()}")
        adapted.unmerge_adapter()
        for dtype in (torch.bfloat16, torch.float32):
            if kind != "16 bits" and not study.short:
                twin = copy.deepcopy(adapted)
                twin.merge_and_unload(dequantize=dtype)
                study.show(f"  into {dtype}: {twin.base_model.merge_report}")


def main() -> int:
    """Both runs, and the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mails", type=int, default=24, help="held-out mails that are answered")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    study = Study(__doc__, parser)
    count, steps = (1, 2) if study.short else (study.options.mails, study.options.steps)
    with tempfile.TemporaryDirectory() as folder:
        (wide_before, wide, wide_size), (narrow_before, narrow, narrow_size) = (
            learn(study, kind, count, steps, Path(folder) / str(kind)) for kind in (None, "nf4")
        )
    gap = 100 * (wide.exact - narrow.exact) / len(narrow.answers)
    study.show(f"nf4 takes {narrow_size / wide_size:.0%} of the bytes; exact answers {0 - gap:+.1f} points\n")
    study.claim("both learn: the loss on held-out mails falls",
                wide.loss < wide_before and narrow.loss < narrow_before)  # fmt: skip
    study.claim("the base of 4 bits takes less than two thirds of the bytes", narrow_size < wide_size * 2 / 3)
    if not study.short:
        study.claim("over 4 bits at most ten points fewer mails are answered exactly than over 16", gap <= 10)
    study.extra |= {
        kind: {"exact": score.exact, "of": len(score.answers), "loss": score.loss}
        for kind, score in (("bf16", wide), ("nf4", narrow))
    }
    return study.finish()


if __name__ == "__main__":
    run(main)
