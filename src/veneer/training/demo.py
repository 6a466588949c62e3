"""The demo: a real language model learns a real task through an adapter, and every claim is checked."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .. import LoraConfig, PeftModel, get_peft_model
from ..files.layout import SAFETENSORS_NAME
from ..files.overwrite import check_replaceable, link_or_copy, replacing
from .adapters import merge, save_merged
from .data import Collator, Row, encode, pad_token, prompt_ids
from .evaluate import answer_loss, exact_match, valid_json
from .generation import generate_answers
from .loop import train
from .models import check_output, demo_model, directory_bytes, load_base
from .options import TrainOptions
from .plots import can_plot, loss_picture
from .progress import Progress, Silent
from .resuming import write_json

INSTRUCTION = (
    "Turn this e-mail header into JSON with the keys date (YYYY-MM-DD), domain (of the sender), "
    "list (or null) and subject."
)
RANK = 16
STEPS = 16
OPTIONS = TrainOptions(learning_rate=1e-3, max_steps=STEPS, batch_size=8)
MAX_NEW_TOKENS = 80
#: Mails on which the merged model is held against the adapter: 32 bits take three times the time of 16.
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


@dataclass(frozen=True)
class Bar:
    """One thing that the demo must reach."""

    what: str
    needed: str
    reached: str
    passed: bool


@dataclass(frozen=True)
class DemoResult:
    """All that the demo found; `passed` says whether every bar was reached."""

    mails: list[dict[str, Any]]
    before: Score
    after: Score
    reloaded: Score
    unmerged: Score
    merged: Score
    kept_in_16_bits: float
    trainable: int
    parameters: int
    sizes: dict[str, int]
    places: dict[str, str]
    seconds: dict[str, float]
    bars: list[Bar]

    @property
    def passed(self) -> bool:
        """Whether every bar was reached."""
        return all(bar.passed for bar in self.bars)


def mails() -> dict[str, list[dict[str, Any]]]:
    """The mail extract: parts ``train``, ``heldout``, ``extra``, each of header and answer."""
    text = resources.files(__package__).joinpath("mails", "mails.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def record_of(mail: dict[str, Any]) -> dict[str, str]:
    """A mail as a training record: prompt and completion."""
    return {"prompt": f"{INSTRUCTION}\n\n{mail['header']}", "completion": json.dumps(mail["answer"])}


def export_demo(place: Path, progress: Progress | None = None) -> dict[str, Path]:
    """Write what the demo works with: the model, and the mails as JSONL of prompt and completion.

    Args:
        place: Directory; it appears whole or not at all.
        progress: Where to report.

    Returns:
        ``model``, ``train`` and ``heldout``: a transformers directory and two files.

    Raises:
        TrainingError: The model cannot be fetched.
        VeneerError: The directory holds files already, or cannot be written.
    """
    check_replaceable(place)
    source = demo_model(progress)
    with replacing(place) as made:
        # A model of the cache is never written to, so that the same files will do where the disk allows it.
        shutil.copytree(source, made / source.name, copy_function=_linked)
        for part in ("train", "heldout"):
            lines = [json.dumps(record_of(mail)) + "\n" for mail in mails()[part]]
            (made / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    files = {part: place / f"{part}.jsonl" for part in ("train", "heldout")}
    return {"model": place / source.name, **files}


def _linked(source: str, target: str) -> str:
    link_or_copy(os.path.realpath(source), target)
    return target


@dataclass
class Examiner:
    """Asks a model for the records of the held-out mails."""

    tokenizer: Any
    mails: list[dict[str, Any]]
    progress: Progress
    max_new_tokens: int = MAX_NEW_TOKENS
    rows: list[Row] = field(init=False)
    prompts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        records = [record_of(mail) for mail in self.mails]
        self.rows = encode(records, self.tokenizer).rows
        self.prompts = [prompt_ids(record["prompt"], self.tokenizer) for record in records]

    def loss(self, model: Any) -> float:
        """Loss of the right answers."""
        return answer_loss(model, self.rows, Collator(pad_token(self.tokenizer)), 16, self.progress)

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


def run_demo(output: Path, seed: int = 0, progress: Progress | None = None) -> DemoResult:
    """Fetch, examine, train, examine, save, reload, examine, merge, examine; write metrics and a picture.

    Args:
        output: Directory for the adapter, the merged model, ``metrics.json`` and ``loss.png``.
        seed: Of the factors' start and the order of the mails.
        progress: Where to report.

    Raises:
        TrainingError: The model cannot be fetched, or the loss stops being a number.
    """
    progress = Silent() if progress is None else progress
    check_output(output)
    source = demo_model(progress)
    clock = _Clock()
    parts = mails()
    progress.say(f"1/5  The base model on {len(parts['heldout'])} held-out mails")
    model, tokenizer = load_base(source)
    examiner = Examiner(tokenizer, parts["heldout"], progress)
    before = examiner.examine(model)
    clock.lap("base")

    progress.say(f"2/5  Training an adapter of rank {RANK} on {len(parts['train'])} mails, {STEPS} steps")
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    trainable, parameters = adapted.get_nb_trainable_parameters()
    adapter = output / "adapter"
    rows = encode([record_of(mail) for mail in parts["train"]], tokenizer).rows
    run = train(adapted, tokenizer, rows, adapter, replace(OPTIONS, seed=seed), progress)
    clock.lap("training")
    progress.say("3/5  The trained model on the held-out mails")
    after = examiner.examine(adapted)
    clock.lap("trained")
    del model, adapted

    progress.say(f"4/5  The adapter, reloaded from {adapter} onto a fresh base")
    fresh: Any = PeftModel.from_pretrained(load_base(source)[0], adapter)
    reloaded = examiner.examine(fresh)
    clock.lap("reloaded")
    rounded = merge(fresh)[1]
    del fresh
    progress.say(f"5/5  Adapter and merged model in 32 bits, on {MERGED_MAILS} of the mails")
    examiner = Examiner(tokenizer, parts["heldout"][:MERGED_MAILS], progress)
    wide: Any = PeftModel.from_pretrained(load_base(source, "float32")[0], adapter)
    unmerged = examiner.examine(wide)
    merged_place = output / "merged"
    save_merged(wide, tokenizer, merged_place, overwrite=True)
    del wide
    merged = examiner.examine(load_base(merged_place)[0])
    clock.lap("merged")

    result = DemoResult(
        mails=parts["heldout"],
        before=before,
        after=after,
        reloaded=reloaded,
        unmerged=unmerged,
        merged=merged,
        kept_in_16_bits=rounded.mean,
        trainable=trainable,
        parameters=parameters,
        sizes={
            "adapter": (adapter / SAFETENSORS_NAME).stat().st_size,
            "base": directory_bytes(source, "*.safetensors"),
            "merged": directory_bytes(merged_place, "*.safetensors"),
        },
        places={
            "base model": str(source),
            "adapter": str(adapter),
            "merged model": str(merged_place),
            "metrics": str(output / "metrics.json"),
        },
        seconds=clock.laps,
        bars=bars(before, after, reloaded, unmerged, merged),
    )
    losses = [entry["loss"] for entry in run["losses"]]
    if can_plot():
        result.places["picture"] = str(output / "loss.png")
        _picture(output / "loss.png", losses, result)
    write_json(output / "metrics.json", {**_plain(result), "losses": losses, "options": run["options"]})
    return result


def bars(before: Score, after: Score, reloaded: Score, unmerged: Score, merged: Score) -> list[Bar]:
    """What must hold for the demo to have succeeded."""
    total = len(after.answers)
    return [
        Bar("valid JSON", "at least 90 %", f"{after.valid}/{total}", after.valid >= 0.9 * total),
        Bar("exact answers", "at least half", f"{after.exact}/{total}", after.exact >= 0.5 * total),
        Bar(
            "held-out loss",
            "at most half of before",
            f"{before.loss:.3f} -> {after.loss:.3f}",
            after.loss <= 0.5 * before.loss,
        ),
        _agreement("reloaded adapter", after, reloaded),
        _agreement("merged model", unmerged, merged),
    ]


def _agreement(what: str, one: Score, other: Score) -> Bar:
    total = len(one.answers)
    same = sum(a == b for a, b in zip(one.answers, other.answers, strict=True))
    return Bar(
        what,
        "same answers, same loss",
        f"{same}/{total}, {one.loss:.4f} and {other.loss:.4f}",
        same == total and abs(other.loss / one.loss - 1) <= SAME_LOSS,
    )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 1), now


def _plain(result: DemoResult) -> dict[str, Any]:
    content = {k: v for k, v in asdict(result).items() if k != "mails"}
    content["passed"] = result.passed
    content["mails"] = len(result.mails)
    return content


def _picture(path: Path, losses: list[float], result: DemoResult) -> None:
    total = len(result.mails)
    before, after = result.before, result.after
    loss_picture(
        path,
        losses,
        f"SmolLM2-135M learns to read mail headers: adapter of {result.sizes['adapter'] / 1e6:.0f} MB, "
        f"base of {result.sizes['base'] / 1e6:.0f} MB",
        held_out=[(0, before.loss), (len(losses), after.loss)],
        shares={
            "valid JSON": (before.valid / total, after.valid / total),
            "exact answers": (before.exact / total, after.exact / total),
        },
    )
