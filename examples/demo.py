"""The demo: SmolLM2-135M learns to turn the header of an e-mail into JSON, and every claim is checked.

The base answers held-out mails; an adapter is trained and answers them too. Then the adapter is loaded onto a
fresh base, and merged into 32-bit weights, and must give the same answers each time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import data
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from side_by_side import Study, run

from veneer import LoraConfig, PeftModel, VeneerWarning, get_peft_model
from veneer.training import (
    Collator,
    Progress,
    TrainOptions,
    answer_loss,
    encode,
    exact_match,
    generate_answers,
    load_base,
    prompt_ids,
    train,
    valid_json,
)
from veneer.training.plots import loss_picture

RANK = 16
STEPS = 16
OPTIONS = TrainOptions(learning_rate=1e-3, max_steps=STEPS, batch_size=8)
MAX_NEW_TOKENS = 80
#: Mails that the merged model answers: 32 bits take three times the time of 16.
MERGED_MAILS = 24
#: Relative difference of two losses that are the same but for the order of summation in 32 bits.
SAME_LOSS = 1e-4


@dataclass(frozen=True)
class Score:
    """How a model does on the held-out mails."""

    exact: int
    valid: int
    loss: float
    answers: list[str] = field(repr=False)

    def agrees(self, other: Score) -> bool:
        """Whether two models that should be the same gave the same answers, and have the same loss."""
        return self.answers == other.answers and abs(other.loss / self.loss - 1) <= SAME_LOSS


@dataclass
class Examiner:
    """Asks a model for the records of mails."""

    tokenizer: Any
    mails: list[dict[str, Any]]
    progress: Progress
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        records = [data.record_of(mail) for mail in self.mails]
        self.rows = encode(records, self.tokenizer).rows
        self.prompts = [prompt_ids(record["prompt"], self.tokenizer) for record in records]

    def loss(self, model: Any) -> float:
        """Loss of the right answers."""
        return answer_loss(model, self.rows, Collator(self.tokenizer.pad_token_id), 16, self.progress)

    def examine(self, model: Any) -> Score:
        """Loss of the right answers, and how many of the model's own are right."""
        loss = self.loss(model)
        answers = generate_answers(
            model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=24,
            progress=self.progress,
        )
        exact = sum(exact_match(a, mail["answer"]) for a, mail in zip(answers, self.mails, strict=True))
        return Score(exact, sum(map(valid_json, answers)), loss, answers)


def export(place: Path) -> None:
    """Write the demo's model, and its mails as JSONL with prompt and completion."""
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise SystemExit(f"{place} is not empty; name a new directory")
    source = data.smollm2()
    shutil.copytree(source, place / source.name)
    for part in ("train", "heldout"):
        lines = [json.dumps(data.record_of(mail)) + "\n" for mail in data.headers()[part]]
        (place / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


@contextmanager
def timed(study: Study, what: str) -> Iterator[None]:
    """Announce a stage, and note how long it took."""
    study.progress.say(what)
    begun = time.monotonic()
    yield
    study.extra.setdefault("seconds", {})[what] = round(time.monotonic() - begun, 1)


def main() -> int:
    """Examine, train, examine, load again, examine, merge, examine."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--seed", type=int, default=0, help="of the factors' start and the order of the mails"
    )
    parser.add_argument("--export", type=Path, help="only write the model and the mails into this directory")
    study = Study(__doc__, parser)
    if study.options.export is not None:
        export(study.options.export)
        study.show(f"The model, train.jsonl and heldout.jsonl are in {study.options.export}")
        return 0
    source, mails, adapter = data.smollm2(), data.headers(), study.out / "adapter"
    options, tokens = replace(OPTIONS, seed=study.options.seed), MAX_NEW_TOKENS
    if study.short:
        mails = {"train": mails["train"][:8], "heldout": mails["heldout"][:1]}
        options, tokens = replace(options, max_steps=2, batch_size=2), 4
    heldout = mails["heldout"]

    dtype = str(data.fast_dtype()).removeprefix("torch.")
    model, tokenizer = load_base(source, dtype)
    examiner = Examiner(tokenizer, heldout, study.progress, tokens)
    with timed(study, f"1/5  The base model, in {dtype}, on {len(heldout)} held-out mails"):
        before = examiner.examine(model)
    steps = options.max_steps
    with timed(
        study, f"2/5  Training an adapter of rank {RANK} on {len(mails['train'])} mails, {steps} steps"
    ):
        torch.manual_seed(options.seed)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(model, config)
        trainable, parameters = adapted.get_nb_trainable_parameters()
        rows = encode([data.record_of(mail) for mail in mails["train"]], tokenizer).rows
        found = train(adapted, tokenizer, rows, adapter, options, study.progress)
        losses = [entry["loss"] for entry in found["losses"]]
    with timed(study, "3/5  The trained model on the held-out mails"):
        after = examiner.examine(adapted)
    del model, adapted
    with timed(study, "4/5  The adapter, loaded again onto a fresh base"):
        fresh: Any = PeftModel.from_pretrained(load_base(source, dtype)[0], adapter)
        reloaded = examiner.examine(fresh)
    del fresh
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # how much is lost is printed below
        narrow: Any = PeftModel.from_pretrained(load_base(source, "bfloat16")[0], adapter)
        kept = narrow.merge_adapter().mean
    del narrow
    examiner = Examiner(tokenizer, heldout[:MERGED_MAILS], study.progress, tokens)
    with timed(study, f"5/5  Adapter and merged model in 32 bits, on {len(examiner.mails)} of the mails"):
        wide: Any = PeftModel.from_pretrained(load_base(source, "float32")[0], adapter)
        unmerged = examiner.examine(wide)
        wide.merge_and_unload().save_pretrained(study.out / "merged")
        tokenizer.save_pretrained(study.out / "merged")
        del wide
        merged = examiner.examine(load_base(study.out / "merged")[0])

    for mail, one, other in telling(heldout, before, after):
        study.show(side_by_side(mail, one, other))
    study.show(f"{len(heldout)} held-out mails, whose senders and threads it was not trained on:")
    study.show(scores(before=before, after=after, reloaded=reloaded))
    size = {name: megabytes(place) for name, place in
            (("adapter", adapter), ("base", source), ("merged", study.out / "merged"))}  # fmt: skip
    study.show(
        f"Trained {trainable:,} of {parameters:,} parameters ({trainable / parameters:.2%}). The adapter has "
        f"{size['adapter']:.0f} MB, the base {size['base']:.0f} MB.\nMerged into 32-bit weights "
        f"({size['merged']:.0f} MB), which round the last place only; 16-bit weights would have kept "
        f"{kept:.1%} of the update.\n"
    )
    claim(study, before, after, reloaded, unmerged, merged)
    total = len(heldout)
    loss_picture(
        study.out / "demo.png",
        losses,
        f"SmolLM2-135M learns to read mail headers: adapter of {size['adapter']:.0f} MB, "
        f"base of {size['base']:.0f} MB",
        held_out=[(0, before.loss), (len(losses), after.loss)],
        shares={
            "valid JSON": (before.valid / total, after.valid / total),
            "exact answers": (before.exact / total, after.exact / total),
        },
    )
    study.extra |= {"losses": losses, "trainable": trainable, "megabytes": size, "kept in 16 bits": kept}
    study.extra["scores"] = {
        name: {"exact": score.exact, "valid": score.valid, "loss": score.loss, "of": len(score.answers)}
        for name, score in (("before", before), ("after", after), ("reloaded", reloaded),
                            ("unmerged", unmerged), ("merged", merged))
    }  # fmt: skip
    return study.finish()


def claim(study: Study, before: Score, after: Score, reloaded: Score, unmerged: Score, merged: Score) -> None:
    """What must hold for the demo to have succeeded; the short form learns too little for the first three."""
    total = len(after.answers)
    if not study.short:
        study.claim(
            f"at least 90 % of the answers are valid JSON: {after.valid}/{total}", after.valid >= 0.9 * total
        )
        study.claim(
            f"at least half of the answers are exact: {after.exact}/{total}", after.exact >= 0.5 * total
        )
        study.claim(
            f"the held-out loss falls to at most half: {before.loss:.3f} -> {after.loss:.3f}",
            after.loss <= 0.5 * before.loss,
        )
    study.claim("the adapter, loaded again, gives the same answers and the same loss", after.agrees(reloaded))
    study.claim("the merged model gives the same answers and the same loss", unmerged.agrees(merged))


def telling(
    mails: list[dict[str, Any]], before: Score, after: Score
) -> list[tuple[dict[str, Any], str, str]]:
    """Two short mails that were learned, and one that was not, with the answers before and after."""
    found = sorted(zip(mails, before.answers, after.answers, strict=True), key=lambda f: len(f[0]["header"]))
    right = [exact_match(answer, mail["answer"]) for mail, _, answer in found]
    return [f for f, good in zip(found, right, strict=True) if good][:2] + [
        f for f, good in zip(found, right, strict=True) if not good
    ][:1]


def side_by_side(mail: dict[str, Any], before: str, after: str) -> Table:
    """A mail's header over its two answers; `Text` shows them as they are, without markup."""
    table = Table(title=Text(mail["header"]), title_justify="left", title_style="", expand=True)
    table.add_column("before", ratio=1)
    table.add_column(f"after ({'right' if exact_match(after, mail['answer']) else 'wrong'})", ratio=1)
    before = before.strip()
    table.add_row(Text(before[:200] + " …" * (len(before) > 200)), Text(after.strip()))
    return table


def scores(**found: Score) -> Table:
    """Exact answers, valid JSON and loss, a column for each model."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    table.add_row("exact answers", *(f"{score.exact}/{len(score.answers)}" for score in found.values()))
    table.add_row("valid JSON", *(f"{score.valid}/{len(score.answers)}" for score in found.values()))
    table.add_row("held-out loss", *(f"{score.loss:.3f}" for score in found.values()))
    return table


def megabytes(place: Path) -> float:
    """Size of the weights in a directory."""
    return sum(file.stat().st_size for file in place.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    run(main)
