"""The loss of answers, and answers that are the expected object."""

from __future__ import annotations

import math

import torch

from tests.tolerances import assert_close
from tests.unit.training.tiny import RECORDS, tiny_model, tiny_tokenizer
from veneer.training import (
    Collator,
    answer_loss,
    encode,
    exact_match,
    valid_json,
)

TOKENIZER = tiny_tokenizer()
ROWS = encode(RECORDS, TOKENIZER).rows
UNEVEN = [{**row, "input_ids": [9] * n + row["input_ids"], "labels": [-100] * n + row["labels"]}
          for n, row in enumerate(ROWS[:4])]  # fmt: skip


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
