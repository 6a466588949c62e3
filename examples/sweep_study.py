"""What is said about LoRA, tried on two tasks with each method at its own best learning rate.

MiniLM tells spam by its subject, SmolLM2 translates Django's messages (``make examples-data``).
`veneer sweep` trains the adapters. Full fine-tuning is a loop of plain torch with the same examples, order,
schedule and evaluation. Results are kept, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sequence_classification import MINILM, spam_examples
from side_by_side import COLOURS, Study, run, write
from transformers import get_scheduler

from veneer import get_peft_model
from veneer.sweep.options import SweepOptions
from veneer.sweep.sweep import sweep
from veneer.sweep.trial import Trial, trials
from veneer.training import Collator, LabelCollator, encode, encode_classification, load_base
from veneer.training.evaluate import objective_loss
from veneer.training.losses import Answers, Classes, Objective
from veneer.training.stopping import Interrupted

#: The middle of the first three rates, by kind of training; the rates lie half a decade apart.
LORA_START, FULL_START = 2e-3, 1e-4
#: Half-width of a 95 % interval by the number of seeds, in standard errors (Student's t).
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
LORA, FULL, ATTENTION, LARGE = "LoRA, r=16", "full fine-tuning", "attention only", ", large batch"
RANKS = {4: "LoRA, r=4", 16: LORA, 64: "LoRA, r=64"}
VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
}


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        name: Of its directory.
        title: In tables and pictures.
        batches: The batch sizes that are compared.
        attention: Options of an adapter of the attention alone, with as many parameters as r=16 everywhere.
        options: For all runs.
        prepare: Writes ``train.jsonl`` and ``heldout.jsonl`` into a directory, and returns the model's own.
    """

    name: str
    title: str
    batches: tuple[int, int]
    attention: dict[str, Any]
    options: dict[str, Any]
    prepare: Callable[[Path, bool], Path]


def spam(folder: Path, small: bool) -> Path:
    """Subjects of mails; no two are the same."""
    parts = spam_examples(*((64, 32) if small else (1024, 400)), body=False)
    for part, name in (("train", "train"), ("validation", "heldout")):
        records = [{"text": e["text"], "label": "spam" if e["label"] else "mail"} for e in parts[part]]
        jsonl(folder / f"{name}.jsonl", records)
    return MINILM


def translation(folder: Path, small: bool) -> Path:
    """Short messages of Django in English and Spanish, and SmolLM2 without its chat template."""
    pairs = [
        (english, spanish)
        for english, spanish in data.translations("es")
        if not set(english) & set("%{\n") and english.count(" ") > 1 and len(english + spanish) <= 90
    ]
    random.Random(0).shuffle(pairs)
    records = [{"prompt": f"English: {a}\nSpanish:", "completion": f" {b}"} for a, b in pairs]
    jsonl(folder / "train.jsonl", records[: 8 if small else 64])
    jsonl(folder / "heldout.jsonl", records[64 : 68 if small else 112])
    base = folder / "base"
    base.mkdir(exist_ok=True)
    for file in data.smollm2().iterdir():
        if file.name != "chat_template.jinja" and not (base / file.name).exists():
            (base / file.name).symlink_to(file.resolve())
    return base


def jsonl(path: Path, records: Sequence[dict[str, str]]) -> None:
    write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


TASKS = (
    Task(
        "spam",
        "spam (MiniLM, 22.7 M)",
        (16, 128),
        {"lora_r": 37, "lora_target_modules": "query,key,value,attention.output.dense"},
        {"task": "seq-cls", "max_length": 16},
        spam,
    ),
    Task(
        "translation",
        "translation (SmolLM2, 135 M)",
        (4, 16),
        {"lora_r": 42, "lora_target_modules": "q_proj,k_proj,v_proj,o_proj"},
        {"dtype": "float32", "max_length": 64},
        translation,
    ),
)


@dataclass
class Curve:
    """Held-out losses of one method: by learning rate, those of the seeds; infinite where a run diverged."""

    losses: dict[float, list[float]] = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """Those that were tried, ascending."""
        return sorted(self.losses)

    @property
    def best(self) -> float:
        """The rate with the lowest mean."""
        return min(self.rates, key=lambda rate: statistics.fmean(self.losses[rate]))

    @property
    def at_best(self) -> list[float]:
        """The losses of the seeds at that rate."""
        return self.losses[self.best]

    @property
    def beyond(self) -> int:
        """-1 or 1 where the best rate is the lowest or the highest that was tried, otherwise 0."""
        return (self.best == self.rates[-1]) - (self.best == self.rates[0])

    def optima(self) -> list[float]:
        """For each seed, log10 of its best rate: the lowest point of the parabola through its best three."""
        x = np.log10(self.rates)
        found = []
        for losses in zip(*(self.losses[rate] for rate in self.rates), strict=True):
            at = int(np.argmin(losses))
            near, optimum = slice(max(at - 1, 0), at + 2), x[at]
            if len(x[near]) == 3 and np.isfinite(losses[near]).all():
                a, b, _ = np.polyfit(x[near] - x[at], np.log(losses[near]), 2)
                optimum -= b / (2 * a)
            found.append(float(optimum))
        return found


class Runs:
    """Trains what is compared on a task; what an earlier call has trained is read."""

    def __init__(self, study: Study, task: Task) -> None:
        self.study, self.task = study, task
        self.folder = study.out / (f"{task.name}-short" if study.short else task.name)
        self.folder.mkdir(exist_ok=True)
        self.options: dict[str, Any] = {
            "model": str(task.prepare(self.folder, study.short)),
            "data": str(self.folder / "train.jsonl"),
            "eval_data": str(self.folder / "heldout.jsonl"),
            "seeds": len(study.seeds),
            "batch_size": task.batches[0],
            "max_steps": 2 if study.short else None,
            "early_stop": False,
            "memory": "6GB",
            **task.options,
        }
        self.curves: dict[str, Curve] = {}
        self.base = math.inf
        self._load()

    def _load(self) -> None:
        read = [
            [json.loads(line) for line in Path(self.options[part]).read_text("utf-8").splitlines()]
            for part in ("data", "eval_data")
        ]
        names = sorted({record["label"] for record in read[0]}) if "label" in read[0][0] else None
        torch.manual_seed(0)  # the head is drawn, and is to be that of a sweep
        self.model, tokenizer = load_base(self.options["model"], "float32", label_names=names)
        self.model.eval()
        length, pad = self.options["max_length"], tokenizer.pad_token_id
        coder: Any = encode_classification if names else encode
        self.rows, self.heldout = (coder(records, tokenizer, length).rows for records in read)
        self.objective: Objective = Classes(LabelCollator(pad)) if names else Answers(Collator(pad))

    def lora(self, method: str, rates: Sequence[float], own: dict[str, Any]) -> dict[float, list[float]]:
        """Sweep some rates."""
        place = self.folder / method / " ".join(f"{rate:g}" for rate in rates)
        saved = place / "sweep.json"
        found = json.loads(saved.read_text("utf-8")) if saved.is_file() else {"finished": False}
        if not found["finished"]:
            options = SweepOptions(**{**self.options, "output": str(place), "resume": saved.is_file(), **own})
            try:
                found = sweep(options, {"learning_rate": list(rates)})
            except Interrupted as left:
                self.study.keep_time()
                raise SystemExit(f"{left}: the same command goes on") from None
            for adapter in place.glob("run-*"):
                shutil.rmtree(adapter)  # only the losses are used
        self.base = found["base"]
        losses: dict[float, list[float]] = {rate: [] for rate in rates}
        for one in found["runs"]:
            end = one["evaluations"][-1]["loss"] if one["state"] == "done" else math.inf
            losses[one["values"]["learning_rate"]].append(end)
        return losses

    def full(self, method: str, rates: Sequence[float], own: dict[str, Any]) -> dict[float, list[float]]:
        """Train all parameters, with the examples, order and schedule of a sweep."""
        options = SweepOptions(**{**self.options, "output": method, **own})
        place = self.folder / f"{method}.json"
        known = json.loads(place.read_text()) if place.is_file() else {}
        losses: dict[float, list[float]] = {rate: [] for rate in rates}
        for trial in trials(options, {"learning_rate": list(rates)}, len(self.rows)):
            rate = trial.options.learning_rate
            name = f"{rate:g}, seed {trial.options.seed}"
            if name not in known:
                tuned = copy.deepcopy(self.model)
                fine_tune(tuned, self.rows, self.objective, trial)
                known[name] = objective_loss(tuned, self.heldout, self.objective, 16)
                write(place, json.dumps(known, indent=1))
            losses[rate].append(known[name] if math.isfinite(known[name]) else math.inf)
        return losses

    def add(self, method: str, start: float, **own: Any) -> None:
        """Find the best rate of a method.

        The first rates lie half a decade apart; there are more until the best has neighbours on both sides.
        Then two lie beside it, a quarter of a decade away.
        """
        train = self.full if method.startswith(FULL) else self.lora
        found = self.curves[method] = Curve()
        wanted = [start] if self.study.short else [steps(start, n) for n in (-2, 0, 2)]
        while wanted:
            found.losses |= train(method, wanted, own)
            wanted = [steps(found.best, 2 * found.beyond)] if found.beyond and len(found.losses) < 7 else []
        if not self.study.short:
            found.losses |= train(method, [steps(found.best, n) for n in (-1, 1)], own)
        self.study.keep_time()
        self.study.progress.say(
            f"  {self.task.name}, {method}: {statistics.fmean(found.at_best):.4f} at {found.best:g}, "
            f"of {', '.join(f'{rate:g}' for rate in found.rates)}"
        )

    def parameters(self, **own: Any) -> int:
        """Those of an adapter, without a head."""
        options = SweepOptions(**{**self.options, "output": "none", **own})
        model: Any = get_peft_model(copy.deepcopy(self.model), options.lora_config())
        return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def steps(rate: float, quarters: int) -> float:
    """A rate so many quarters of a decade away, with two digits."""
    return float(f"{rate * 10 ** (quarters / 4):.1e}")


def fine_tune(model: Any, rows: Sequence[Any], objective: Objective, trial: Trial) -> None:
    """Train all parameters with AdamW, as a sweep trains those of an adapter."""
    options = trial.options
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_scheduler(options.lr_scheduler_type, optimizer, 0, trial.steps)
    while trial.step < trial.steps:
        (chosen,) = trial.batches(rows)
        batch = objective.collator(chosen)
        total, _ = objective.loss(model, batch)
        optimizer.zero_grad()
        (total / (batch["labels"] != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        schedule.step()
        trial.step += 1


@dataclass(frozen=True)
class Finding:
    """What the seeds say of a claim on one task.

    Attributes:
        claim: A sentence.
        label: In the picture.
        values: Of the seeds; of a factor, log10.
        held: From where to where the claim holds.
        unit: ``times`` for a factor; ``%`` or ``points`` for a difference.
    """

    claim: str
    label: str
    values: list[float]
    held: tuple[float, float]
    unit: str = "%"

    @property
    def factor(self) -> bool:
        """Whether the values are those of a factor."""
        return self.unit == "times"

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean, and the 95 % interval around it."""
        mean, count = statistics.fmean(self.values), len(self.values)
        if count < 2:
            return mean, -math.inf, math.inf
        half = T95.get(count, 1.96) * statistics.stdev(self.values) / math.sqrt(count)
        return mean, mean - half, mean + half

    @property
    def verdict(self) -> str:
        """The claim held if the whole interval says so."""
        _, low, high = self.interval
        if self.held[0] <= low and high <= self.held[1]:
            return "held"
        return "did not hold" if high < self.held[0] or low > self.held[1] else "undecided"

    def __str__(self) -> str:
        mean, low, high = (f"{10**v:.2g}" if self.factor else f"{v:+.1f}" for v in self.interval)
        return f"{mean} {self.unit}" if len(self.values) < 2 else f"{mean} {self.unit} ({low} to {high})"


def findings(curves: dict[str, Curve]) -> list[Finding]:
    """What the curves of one task say of each claim."""

    def apart(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(curves[one].optima(), curves[other].optima(), strict=True)]

    def worse(one: str, other: str) -> list[float]:
        pairs = zip(curves[one].at_best, curves[other].at_best, strict=True)
        return [100 * (a / b - 1) for a, b in pairs]

    batch = [a - b for a, b in zip(worse(LORA + LARGE, LORA), worse(FULL + LARGE, FULL), strict=True)]
    half, above, same = math.log10(3), (0.0, math.inf), (-2.0, 2.0)
    return [
        Finding("LoRA's best rate is about ten times that of full fine-tuning (3 to 30 times)",
                "LoRA ÷ full", apart(LORA, FULL), (half, 1 + half), "times"),
        Finding("the best rate does not depend on the rank: r=64 needs that of r=4, within a factor of 3",
                "r=64 ÷ r=4", apart(RANKS[64], RANKS[4]), (-half, half), "times"),
        Finding("attention only does worse than all layers with as many parameters",
                "attention only", worse(ATTENTION, LORA), above),
        Finding("a larger batch costs LoRA more than full fine-tuning",
                "larger batch", batch, above, "points"),
        *(
            Finding(f"{name} makes no difference of more than 2 %", name, worse(name, LORA), same)
            for name in VARIANTS
        ),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=[task.name for task in TASKS], help="only one of them")
    study = Study(__doc__, parser)
    study.go_on()
    chosen = [task for task in TASKS if study.options.task in (None, task.name)]
    done = {task.title: trained(study, task) for task in (chosen[:1] if study.short else chosen)}
    found = {title: findings(runs.curves) for title, runs in done.items()}
    for runs in done.values():
        show(study, runs)
    study.show("\nWhat became of the claims: mean and 95 % interval; losses against those of LoRA, r=16.\n")
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("claim", max_width=46)
    for title in found:
        table.add_column(title)
    for same in zip(*found.values(), strict=True):
        table.add_row(same[0].claim, *(f"{one.verdict}\n{one}\n" for one in same))
    study.show(table)
    for title, runs in done.items():
        every, attention = runs.parameters(), runs.parameters(**runs.task.attention)
        study.claim(f"{title}: r=16 everywhere and attention only have as many parameters, within 1 %",
                    abs(attention / every - 1) < 0.01)  # fmt: skip
        if study.short:
            continue
        curves = runs.curves.values()
        study.claim(f"{title}: at its best rate, every method does better than the base, with every seed",
                    all(max(curve.at_best) < runs.base for curve in curves))  # fmt: skip
        study.claim(f"{title}: of every method, lower and higher rates than the best one were tried",
                    not any(curve.beyond for curve in curves))  # fmt: skip
    study.extra["losses"] = {
        title: {method: curve.losses for method, curve in runs.curves.items()} for title, runs in done.items()
    }
    draw_rates(study, done)
    draw_findings(study, found)
    return study.finish()


def trained(study: Study, task: Task) -> Runs:
    """A task with the curves of all methods."""
    runs = Runs(study, task)
    for r, method in RANKS.items():
        runs.add(method, LORA_START, lora_r=r)
    runs.add(FULL, FULL_START)
    runs.add(ATTENTION, LORA_START, **task.attention)
    runs.add(LORA + LARGE, LORA_START, batch_size=task.batches[1])
    runs.add(FULL + LARGE, FULL_START, batch_size=task.batches[1])
    for name, options in VARIANTS.items():
        runs.add(name, LORA_START, **options)
    return runs


def show(study: Study, runs: Runs) -> None:
    """The best rate and the loss of every method."""
    small, large = runs.task.batches
    study.show(
        f"{runs.task.title}: {len(runs.rows)} examples, batches of {small} or {large}, {len(runs.heldout)} "
        f"held-out; base {runs.base:.3f}\n"
    )
    table = Table(
        "", "best rate", "held-out loss (lowest–highest)", "rates tried", box=SIMPLE_HEAD, show_edge=False
    )
    for method, curve in runs.curves.items():
        losses = curve.at_best
        spread = f"{statistics.fmean(losses):.3f} ({min(losses):.3f}–{max(losses):.3f})"
        optimum = 10 ** statistics.fmean(curve.optima())
        table.add_row(method, f"{optimum:.1e}", spread, f"{curve.rates[0]:.0e} to {curve.rates[-1]:.0e}")
    study.show(table)


def draw_rates(study: Study, done: dict[str, Runs]) -> None:
    """Held-out loss over the learning rate: ranks, batches, and the rest, for each task."""
    columns = (
        (FULL, *RANKS.values()),
        (FULL, FULL + LARGE, LORA, LORA + LARGE),
        (LORA, ATTENTION, *VARIANTS),
    )
    colours = dict(zip((LORA, FULL), COLOURS[2:0:-1], strict=True))
    figure, grid = study.figure(11, 3.4 * len(done), nrows=len(done), ncols=3, squeeze=False, sharey="row")
    for line, (title, runs) in zip(grid, done.items(), strict=True):
        for axes, methods in zip(line, columns, strict=True):
            others = iter((*COLOURS[3:], COLOURS[1]))
            for method in methods:
                colour = colours.get(method.removesuffix(LARGE)) or next(others)
                style = "o--" if method.endswith(LARGE) else "o-"
                curve = runs.curves[method]
                seeds = [curve.losses[rate] for rate in curve.rates]
                middle = [statistics.fmean(losses) for losses in seeds]
                axes.plot(curve.rates, middle, style, ms=3.5, color=colour, label=method)
                axes.fill_between(
                    curve.rates, list(map(min, seeds)), list(map(max, seeds)), color=colour, alpha=0.2, lw=0
                )
            axes.set_xscale("log")
            axes.set_xlabel("learning rate")
            axes.spines[["top", "right"]].set_visible(False)
            if axes in grid[0]:
                axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        lowest = min(statistics.fmean(curve.at_best) for curve in runs.curves.values())
        line[0].set_ylim(0.95 * lowest, min(runs.base, 2 * lowest))
        line[0].set_ylabel(f"{title}\nheld-out loss")
    study.save_figure(figure, "rates")


def draw_findings(study: Study, found: dict[str, list[Finding]]) -> None:
    """The intervals of the tasks over the range in which each claim holds."""
    figure, (factors, differences) = study.figure(10, 4.4, ncols=2, width_ratios=(3, 4))
    factors.set_xscale("log")
    for axes, is_factor in ((factors, True), (differences, False)):
        for shift, colour, (title, every) in zip((0.14, -0.14), COLOURS[2::2], found.items(), strict=False):
            chosen = [one for one in every if one.factor is is_factor][::-1]
            for place, one in enumerate(chosen):
                mean, low, high = (10**v if is_factor else v for v in one.interval)
                if math.isfinite(high):
                    axes.plot([low, high], [place + shift] * 2, color=colour, lw=2)
                axes.plot(mean, place + shift, "o", color=colour, label=None if place else title)
        left, right = axes.get_xlim()
        if is_factor:
            left, right = min(left, 0.2), max(right, 50)
            ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300) if left < tick < right]
            axes.set_xticks(ticks, list(map(str, ticks)))
            axes.minorticks_off()
        for place, one in enumerate(chosen):
            low, high = (10**v if is_factor else v for v in one.held)
            where = [max(low, left), min(high, right)]
            label = None if place else "the claim holds"
            axes.fill_between(
                where, place - 0.4, place + 0.4, color=COLOURS[0], alpha=0.5, lw=0, zorder=0, label=label
            )
        axes.set_xlim(left, right)
        axes.axvline(1 if is_factor else 0, color=COLOURS[3], lw=0.8, ls=":")
        axes.set_yticks(range(len(chosen)), [one.label for one in chosen])
        axes.spines[["top", "right"]].set_visible(False)
    factors.set_xlabel("ratio of best learning rates")
    differences.set_xlabel("held-out loss at the best rate, against LoRA, r=16 (%)")
    figure.legend(*factors.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    study.save_figure(figure)


if __name__ == "__main__":
    run(main)
