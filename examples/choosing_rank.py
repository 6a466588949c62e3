"""Choosing the rank: spam by its subject alone, r from 1 to 128, three sizes of data, three seeds.

Two budgets of parameters are also spent in two ways: on a high rank of the attention only, or on a low rank
of every linear layer. MiniLM's lower half is frozen and its output computed once; its upper three layers are
adapted. The mails are SpamAssassin's public corpus (``make examples-data``); no subject is in both training
and held-out mails.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sequence_classification import MINILM, spam_examples
from side_by_side import COLOURS, Study, run, seed_all, spread
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from veneer import LoraConfig, get_peft_model

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (64, 256, 1024)
LENGTH, BATCH, STEPS, FROZEN, RATE = 16, 16, 24, 3, 2e-3
ATTENTION, ALL = ["query", "key", "value", "attention.output.dense"], "all-linear"
#: Ranks of equal size: of a layer, all-linear adapts 18 · 384 · r parameters, attention only 8 · 384 · r.
BUDGETS = ((9, 4), (36, 16))

Rows = tuple[Tensor, Tensor, Tensor]


class Upper(nn.Module):
    """The upper layers of a BERT with a head: hidden states (n, length, 384) -> scores (n, 2)."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(384, 2)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        bias = (1.0 - mask[:, None, None, :]) * -1e9
        for layer in self.layers:
            out = layer(states, bias)
            states = out[0] if isinstance(out, tuple) else out
        return self.head((states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))


@torch.no_grad()
def lower(model: Any, tokenizer: Any, examples: list[dict[str, Any]]) -> Rows:
    """The output of the frozen layers for the subjects: states, mask, labels."""
    texts = [e["text"] for e in examples]
    batch = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    states = model(**batch).last_hidden_state
    return states, batch["attention_mask"].float(), torch.tensor([e["label"] for e in examples])


def fit(model: nn.Module, rows: Rows, steps: int) -> None:
    """Train for the same number of steps whatever the size of the data, which may be repeated."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    order: list[int] = []
    model.train()
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(rows[0])).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        states, mask, labels = (part[chosen] for part in rows)
        loss = nn.functional.cross_entropy(model(states, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def score(model: nn.Module, rows: Rows) -> tuple[float, float]:
    """Accuracy in %, and loss."""
    scores = model.eval()(*rows[:2])
    return (
        100 * (scores.argmax(-1) == rows[2]).float().mean().item(),
        nn.functional.cross_entropy(scores, rows[2]).item(),
    )


@dataclass(frozen=True)
class Setting:
    """One run: the rank, where the factors are, how many mails, the seed, and for how many steps."""

    r: int
    where: str
    size: int
    seed: int
    steps: int


WORK: dict[str, Any] = {}


def begin(upper: nn.ModuleList, train_set: Rows, heldout: Rows) -> None:
    """Give a process what all runs share; each computes with one thread."""
    torch.set_num_threads(1)
    WORK.update(upper=upper, train=train_set, heldout=heldout)


def adapted(setting: Setting) -> dict[str, Any]:
    """Train one adapter and examine it."""
    # Data, head and order depend on the seed and not on the rank: within a seed only the rank differs.
    seed_all(setting.seed)
    model: Any = Upper(copy.deepcopy(WORK["upper"]))
    rows = torch.randperm(len(WORK["train"][0]))[: setting.size]
    targets = ATTENTION if setting.where == "attention" else ALL
    config = LoraConfig(
        r=setting.r, lora_alpha=2 * setting.r, target_modules=targets, modules_to_save=["head"]
    )
    model = get_peft_model(model, config)
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    seed_all(setting.seed)
    begun = time.process_time()
    fit(model, tuple(part[rows] for part in WORK["train"]), setting.steps)
    right, loss = score(model, WORK["heldout"])
    spent = time.process_time() - begun
    return {**vars(setting), "parameters": parameters, "right": right, "loss": loss, "cpu_seconds": spent}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (one for each core)")
    study = Study(__doc__, parser)
    ranks, sizes = ((1, 8), SIZES[1:2]) if study.short else (RANKS, SIZES)
    budgets = BUDGETS[:1] if study.short else BUDGETS
    whole = AutoModel.from_pretrained(MINILM)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    upper = nn.ModuleList(whole.encoder.layer[FROZEN:])
    for module in upper.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    del whole.encoder.layer[FROZEN:]
    parts = spam_examples(max(sizes), 200 if study.short else 600, body=False)
    train_set, heldout = (lower(whole.eval(), tokenizer, parts[part]) for part in ("train", "test"))

    everywhere = {(r, "all-linear") for r in (*ranks, *(low for _, low in budgets))}
    places = sorted(everywhere | {(high, "attention") for high, _ in budgets})
    settings = [
        Setting(r, where, size, seed, 20 if study.short else STEPS)
        for size in sizes
        for r, where in places
        for seed in study.seeds
    ]
    runs = []
    if study.short:
        begin(upper, train_set, heldout)
        runs = list(map(adapted, settings))
    else:
        context, shared = multiprocessing.get_context("spawn"), (upper, train_set, heldout)
        with ProcessPoolExecutor(study.options.jobs, context, begin, shared) as pool:
            for run_ in pool.map(adapted, settings):
                runs.append(run_)
                if len(runs) % len(study.seeds) == 0:
                    last = spread([done["right"] for done in runs[-len(study.seeds) :]])
                    study.progress.say(
                        f"  {run_['size']} mails, {run_['where']}, r={run_['r']}: {last} % right "
                        f"({len(runs)} of {len(settings)} runs)"
                    )
    study.extra["runs"] = runs

    def of(size: int, r: int, where: str = "all-linear", what: str = "right") -> list[float]:
        return [x[what] for x in runs if (x["size"], x["r"], x["where"]) == (size, r, where)]

    middle = {(size, r): statistics.median(of(size, r)) for size in sizes for r in ranks}
    study.show(
        f"{len(heldout[0])} held-out subjects, half of them spam. Right, in %, median (lowest–highest):\n"
    )
    table = Table("r", *(f"{size} mails" for size in sizes), box=SIMPLE_HEAD, show_edge=False)
    for r in ranks:
        table.add_row(str(r), *(spread(of(size, r)) for size in sizes))
    study.show(table)
    table = Table("budget", "where", *(f"{size} mails" for size in sizes), box=SIMPLE_HEAD, show_edge=False)
    for high, low in budgets:
        for r, targets in ((high, "attention"), (low, "all-linear")):
            number = f"{of(sizes[0], r, targets, 'parameters')[0] / 1e3:,.0f} k"
            table.add_row(number, f"{targets}, r={r}", *(spread(of(size, r, targets)) for size in sizes))
    study.show(table)

    same = all(
        of(size, high, "attention", "parameters") == of(size, low, "all-linear", "parameters")
        for (high, low), size in itertools.product(budgets, sizes)
    )
    study.claim("attention only and all-linear are compared at the same number of parameters", same)
    study.claim("every rank does better than chance, in the median", min(middle.values()) > 52)
    if not study.short:
        by_size = [statistics.median(middle[size, r] for r in ranks) for size in sizes]
        by_rank = [statistics.median(middle[size, r] for size in sizes) for r in ranks]
        study.show(
            f"\nFrom {sizes[0]} to {sizes[-1]} mails: {by_size[-1] - by_size[0]:+.1f} points. From "
            f"r={ranks[0]} to r={ranks[-1]}: {by_rank[-1] - by_rank[0]:+.1f} points; from r=8 on the medians "
            f"lie within {max(by_rank[3:]) - min(by_rank[3:]):.1f} points.\n"
        )
        study.claim("more data help more than a higher rank than 8 does",
                    by_size[-1] - by_size[0] > max(by_rank[3:]) - by_rank[3])  # fmt: skip
    draw(study, of, ranks, sizes)
    return study.finish()


def draw(study: Study, of: Any, ranks: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Accuracy over rank, a line for each size; and attention beside all-linear at each budget."""
    figure, (curves, bars) = study.figure(10, 4, ncols=2, width_ratios=(3, 2))
    for size, colour in zip(sizes, (COLOURS[1], COLOURS[4], COLOURS[2]), strict=False):
        found = [of(size, r) for r in ranks]
        curves.plot(ranks, [statistics.median(f) for f in found], "o-", color=colour, label=f"{size} mails")
        curves.fill_between(ranks, [min(f) for f in found], [max(f) for f in found], color=colour, alpha=0.2)
    curves.set_xscale("log", base=2)
    curves.set_xticks(ranks, list(map(str, ranks)))
    curves.set(xlabel="rank, on all linear layers", ylabel="% right of held-out")
    curves.legend(frameon=False, loc="lower right")
    labels = []
    for high, low in BUDGETS[:1] if study.short else BUDGETS:
        for size in sizes:
            for shift, r, where in ((-0.2, high, "attention"), (0.2, low, "all-linear")):
                values = of(size, r, where)
                place = len(labels) + shift
                colour = COLOURS[0] if where == "attention" else COLOURS[2]
                bars.bar(
                    place, statistics.median(values), 0.38, color=colour, label=None if labels else where
                )
                bars.scatter(
                    [place] * len(values), values, color="white", edgecolor="#333333", s=10, zorder=3
                )
            labels.append(f"{size}\n{high} / {low}")
    bars.set_xticks(range(len(labels)), labels, fontsize=7)
    bars.set_ylim(40, None)
    bars.set_xlabel("mails; ranks of the same number of parameters")
    bars.legend(frameon=False, loc="upper left", ncols=2, fontsize=7)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    study.save_figure(figure)


if __name__ == "__main__":
    run(main)
