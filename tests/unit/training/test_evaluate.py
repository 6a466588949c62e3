"""Losses equal transformers' own; answers that are the expected object."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tolerances import assert_close
from tests.unit.training.tiny import RECORDS, tiny_model, tiny_tokenizer
from veneer import LoraConfig, get_peft_model
from veneer.training import (
    Collator,
    answer_loss,
    encode,
    exact_match,
    valid_json,
)
from veneer.training.evaluate import loss_sum

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
    monkeypatch.setattr("veneer.training.evaluate._keeps_logits", lambda model: False)
    assert_close(loss_sum(model, batch)[0], expected)


def test_the_mean_is_over_tokens_and_does_not_depend_on_batches() -> None:
    model = tiny_model().train()
    losses = [answer_loss(model, UNEVEN, Collator(0), size) for size in (1, 3, 8)]
    assert model.training
    assert_close(torch.tensor(losses), torch.tensor(losses[:1]).expand(3))
    assert 2 < losses[0] < 2 * math.log(260)


def test_valid_json_and_exact_match() -> None:
    assert valid_json('{"a": 1}')
    assert not valid_json('{"a": 1} and more')
    assert not valid_json("[1]")
    assert not valid_json("")
    assert not valid_json("[" * 100_000)
    assert exact_match('{"b": null, "a": 1}', {"a": 1, "b": None})
    assert not exact_match('{"a": 1}', {"a": 1, "b": None})
    assert not exact_match('{"a": 1', {"a": 1})
