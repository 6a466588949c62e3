"""Losses and gradients equal transformers' own."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import assert_close
from tests.unit.training.tiny import RECORDS, tiny_model, tiny_tokenizer
from veneer import LoraConfig, get_peft_model
from veneer.training import (
    Collator,
    encode,
)
from veneer.training.losses import loss_sum

TOKENIZER = tiny_tokenizer()
ROWS = encode(RECORDS, TOKENIZER).rows
UNEVEN = [{**row, "input_ids": [9] * n + row["input_ids"], "labels": [-100] * n + row["labels"]}
          for n, row in enumerate(ROWS[:4])]  # fmt: skip


def test_the_loss_equals_that_of_transformers() -> None:
    model = tiny_model()
    for rows in (ROWS[:5], UNEVEN, ROWS[:1]):
        batch = Collator(0)(rows)
        total, count = loss_sum(model, batch)
        assert count == sum(label != -100 for row in rows for label in row["labels"])
        assert_close(total / count, model(**batch).loss)


def test_the_gradient_equals_that_of_transformers() -> None:
    grads = []
    for own in (True, False):
        torch.manual_seed(3)
        model = get_peft_model(
            tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        )
        batch = Collator(0)(UNEVEN)
        total, count = loss_sum(model, batch)
        (total / count if own else model(**batch).loss).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 28
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs)


def test_models_that_compute_all_logits_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    batch = Collator(0)(UNEVEN)
    expected = loss_sum(model, batch)[0]
    monkeypatch.setattr("veneer.forward.takes", lambda model, name: False)
    assert_close(loss_sum(model, batch)[0], expected)
