"""How much of a grid does `veneer sweep` train when it stops runs early, and does it find the grid's best?

A small language model, trained here on the headers of mails from no mailing list (`examples/mails`), is
adapted to those of lists. Each study has seeds of its own. It trains the whole grid, and again with early
stopping: configurations are compared by the mean of three seeds, or with one seed. The last row says how
often one seed of the whole grid finds another best than three do; with one seed, nothing does better.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Figure, Report, Row, question
from examples.data import headers

STUDIES, SEEDS = 10, 3
GRID: dict[str, list[Any]] = {"lora_r": [4, 16, 64], "learning_rate": [3e-3, 1e-2, 3e-2, 1e-1]}
HIDDEN, VOCABULARY, LENGTH = 64, 512, 48
STEPS, BATCH = 18, 8
#: Of the grid's tokens, and of studies that miss its best configuration.
TOKENS, MISSED = 0.3, 1


def prepare(place: Path) -> None:
    """Write the base, the mails to train on and those to compare on."""
    mails = headers()
    base(place / "base", [mail["header"] for mail in mails["train"] if mail["answer"]["list"] is None])
    for part in ("train", "heldout"):
        texts = [{"text": mail["header"]} for mail in mails[part] if mail["answer"]["list"] is not None]
        (place / f"{part}.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")


def base(place: Path, texts: Sequence[str]) -> None:
    """Train and save a tokenizer and a language model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([token for text in texts for token in (*tokenizer(text)["input_ids"], 0)])
    for _ in range(200):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def swept(place: Path, study: int, seeds: int, early_stop: bool) -> dict[str, Any]:
    """What a sweep found."""
    from veneer.sweep.options import SweepOptions
    from veneer.sweep.sweep import sweep

    options = SweepOptions(
        model=str(place / "base"),
        data=str(place / "train.jsonl"),
        eval_data=str(place / "heldout.jsonl"),
        output=str(place / f"{study} {seeds} {early_stop}"),
        seed=study * SEEDS,
        seeds=seeds,
        early_stop=early_stop,
        max_steps=STEPS,
        batch_size=BATCH,
        max_length=LENGTH,
    )
    return sweep(options, GRID)


def losses(full: dict[str, Any], seeds: int) -> dict[str, float]:
    """The held-out loss of each configuration of a whole grid: means of its first seeds, the best first."""
    found = {str(one["values"]): sum(one["losses"][:seeds]) / seeds for one in full["configurations"]}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def measure(quick: bool) -> Report:
    torch.set_num_threads(1)  # the model is too small for more
    studies = 2 if quick else STUDIES
    shares: list[float] = []
    evaluated: list[float] = []
    missed: dict[int, list[bool]] = defaultdict(list)
    above: dict[int, list[float]] = defaultdict(list)
    noise: list[bool] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        prepare(place)
        for study in range(studies):
            full = swept(place, study, SEEDS, early_stop=False)
            for seeds in (SEEDS, 1):
                early, known = swept(place, study, seeds, early_stop=True), losses(full, seeds)
                chosen, (best, *_) = str(early["configurations"][0]["values"]), known
                missed[seeds].append(chosen != best)
                above[seeds].append(100 * (known[chosen] / known[best] - 1))
                noise += [best != next(iter(losses(full, SEEDS)))] * (seeds == 1)
                if seeds == SEEDS:
                    shares.append(early["tokens"]["training"] / full["tokens"]["training"])
                    evaluated.append(sum(early["tokens"].values()) / sum(full["tokens"].values()))
    rows = [
        Row("tokens trained ÷ those of the whole grid", Figure.of(shares), at_most=TOKENS),
        Row("  held-out tokens counted too", Figure.of(evaluated)),
    ]
    for seeds, label in ((SEEDS, "three seeds"), (1, "one seed")):
        said = f"{label}: studies that missed the grid's best"
        bar = MISSED if seeds == SEEDS else None
        rows += [
            Row(said, Figure.exact(sum(missed[seeds])), f"of {studies}", at_most=bar),
            Row("  held-out loss above the best one's", Figure.of(above[seeds]), "%"),
        ]
    said = "one seed of the whole grid: another best than with three"
    rows.append(Row(said, Figure.exact(sum(noise)), f"of {studies}"))
    conditions = {
        "model": f"Llama-shaped, hidden {HIDDEN}, one layer, {VOCABULARY} tokens, trained on other mails",
        "grid": "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in GRID.items()),
        "runs": f"{STEPS} steps of {BATCH} texts of at most {LENGTH} tokens; float32, one thread",
        "largest excess": f"{max(above[SEEDS]):.2f} % with three seeds, {max(above[1]):.2f} % with one",
    }
    return Report(question(__doc__), rows, conditions)
