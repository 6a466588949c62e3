"""Several tasks on one base: three adapters on one MiniLM, switched, and mixed in one batch.

Is a mail spam, to which mailing list was it sent, in which language is a message: each task has an adapter
with a head of its own, on one base of 91 MB. The mails are SpamAssassin's public corpus, the messages
Django's translations (``make examples-data``).
"""

from __future__ import annotations

import collections
import email
import random
import re
from typing import Any

import data
import torch
from sequence_classification import MINILM, spam_examples, words_of
from side_by_side import QUIET, Study, quiet, run
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from veneer import LoraConfig, PeftModel, get_peft_model

LORA, FULL = "LoRA, an adapter each", "full, a model each"
RATES = {LORA: 3e-3, FULL: 2e-4}
LENGTH, BATCH = 24, 16
LANGUAGES = ("de", "nl", "es", "pt")


class Classifier(nn.Module):
    """MiniLM, whose output for a text is the mean of its tokens, with a head for up to four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(MINILM)
        self.config = self.encoder.config  # transformers' Trainer looks into it
        self.head = nn.Linear(self.encoder.config.hidden_size, 4)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        states = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        mask = attention_mask[:, :, None]
        logits = self.head((states * mask).sum(1) / mask.sum(1))
        return {"logits": logits} | (
            {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        )


def list_examples() -> tuple[list[dict[str, Any]], list[str]]:
    """Mails to the four mailing lists with the most subjects, without the lists' marks, and the names."""
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for raw in data.mails():
        mail = email.message_from_string(raw.text)
        subject = re.sub(r"\[[^\]]*\]|\bre:|\s+", " ", str(mail["subject"] or ""), flags=re.I).strip()
        match = re.search(r"<([^>]+)>", str(mail["list-id"] or ""))
        if match and subject:
            found[match[1]].setdefault(re.sub(r"\W|\d", "", subject.lower()), f"{subject}. {words_of(mail)}")
    names = sorted(found, key=lambda name: -len(found[name]))[:4]
    examples = [{"text": text, "label": names.index(name)} for name in names for text in found[name].values()]
    return examples, names


def language_examples() -> list[dict[str, Any]]:
    """Django's messages in four languages; an English text is in one of them only."""
    draw = random.Random(0)
    texts: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for label, language in enumerate(LANGUAGES):
        for english, other in data.translations(language):
            texts[english][label] = other
    return [
        {"text": found[label], "label": label}
        for found in texts.values()
        for label in [draw.choice(sorted(found))]
    ]


def main() -> int:
    study = Study(__doc__, validation=True)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    collate = DataCollatorWithPadding(tokenizer)
    held, steps = (40, 12) if study.short else (160, 40)
    spam = spam_examples(600, 160)
    lists, names_of_lists = list_examples()
    kinds = {"spam": ("other mail", "spam"), "list": names_of_lists, "language": LANGUAGES}
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task, examples in (
        ("spam", [e for part in spam.values() for e in part]),
        ("list", lists),
        ("language", language_examples()),
    ):
        random.Random(0).shuffle(examples)
        rows = [
            {**tokenizer(e["text"], truncation=True, max_length=LENGTH), "labels": e["label"]}
            for e in examples
        ]
        first = 0 if study.part == "validation" else held
        tasks[task] = {"heldout": rows[first : first + held], "train": rows[2 * held :][:480]}

    def build(method: str) -> Any:
        if method == FULL:
            return nn.ModuleDict({task: Classifier() for task in tasks})
        if method == "base":
            return Classifier().requires_grad_(False)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["head"])
        first, *others = tasks
        model = get_peft_model(Classifier(), config, adapter_name=first)
        for task in others:
            model.add_adapter(task, config)
        return model

    def chosen(model: Any, task: str) -> Any:
        """The model for a task: with the task's adapter active, or the task's own model."""
        if isinstance(model, PeftModel):
            model.set_adapter(task)
        return model[task] if isinstance(model, nn.ModuleDict) else model

    def train(model: Any, method: str, seed: int) -> None:
        for task, rows in tasks.items():
            arguments = TrainingArguments(
                study.out,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=RATES[method],
                warmup_steps=0.1,
                seed=seed,
                remove_unused_columns=False,
                **QUIET,
            )
            quiet(Trainer(chosen(model, task), arguments, collate, rows["train"])).train()

    kept: list[Any] = []

    @torch.no_grad()
    def score(model: Any) -> dict[str, float]:
        found = {}
        for task, rows in tasks.items():
            batch = collate(rows["heldout"])
            guesses = chosen(model, task).eval()(**batch)["logits"].argmax(-1)
            found[task] = 100 * (guesses == batch["labels"]).float().mean().item()
        if isinstance(model, PeftModel):
            kept[:] = [model]
        return {"% right, mean": sum(found.values()) / len(found), **found}

    study.compare(["base", *RATES][: 2 if study.short else 3], build, train, score, once=("base", FULL))
    study.claim(
        "the adapters are right more often than the base in every task, with every seed",
        all(study.lowest(LORA, task) > study.highest("base", task) for task in tasks),
    )

    # One batch, a row of each task in turn: adapter_names says which adapter answers which row.
    (model,) = kept
    rows = [dict(tasks[task]["heldout"][i]) for i in range(12) for task in tasks]
    names = list(tasks) * 12
    batch = collate(rows)
    del batch["labels"]
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names)["logits"]
        for task in tasks:
            alone = chosen(model, task)(**batch)["logits"]
            mine = torch.tensor([name == task for name in names])
            study.claim(
                f"in a mixed batch, rows of {task!r} get the same answers as with the adapter switched on",
                torch.equal(alone[mine].argmax(-1), mixed[mine].argmax(-1))
                and bool((alone - mixed)[mine].abs().max() < 1e-4 * alone.abs().max()),
            )
    shown = {name: row for name, row in zip(names[:3], rows[:3], strict=True)}
    for (task, row), logits in zip(shown.items(), mixed, strict=False):
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        study.show(f"{task}: {text!r} is {kinds[task][int(logits.argmax())]}")
    study.picture()
    return study.finish()


if __name__ == "__main__":
    run(main)
