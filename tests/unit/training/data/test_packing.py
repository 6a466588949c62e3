"""Packed examples do not see one another: their losses and gradients are those that they have alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tolerances import assert_close
from tests.unit.training.tiny import RECORDS, tiny_model, tiny_tokenizer
from veneer import DataError, LoraConfig, TrainingError, get_peft_model
from veneer.training import Collator, encode, pack, packing_for
from veneer.training.data.batch import IGNORED, Separation
from veneer.training.losses import loss_sum

TOKENIZER = tiny_tokenizer()
MIXED = [*RECORDS, *({"prompt": "x" * n, "completion": "y" * (n % 7 + 1)} for n in (1, 30, 59, 12))]
ROWS = encode(MIXED, TOKENIZER).rows
TEXTS = encode([{"text": record["prompt"]} for record in RECORDS], TOKENIZER).rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["position_ids", "mask"])
@pytest.mark.parametrize("rows", [ROWS, TEXTS], ids=["answers", "texts"])
def test_losses_of_packed_rows_are_those_of_unpacked_ones(
    attention: str, how: Separation, rows: list[Any]
) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    packed = pack(rows, 100).rows
    assert len(packed) < len(rows) / 2 and len({len(row["input_ids"]) for row in packed}) > 1
    total, count = loss_sum(model, Collator(0, how)(packed))
    alone = [loss_sum(model, Collator(0)([row])) for row in rows]
    assert count == sum(part[1] for part in alone)
    assert_close(total, sum(part[0] for part in alone))


def test_gradients_of_packed_rows_are_those_of_unpacked_ones() -> None:
    gradients = []
    for batch in (Collator(0)(ROWS), Collator(0)(pack(ROWS, 100).rows)):
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_model(), config).train()
        loss_sum(model, batch)[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for packed, plain in zip(*gradients, strict=True):
        assert_close(packed, plain)


def test_a_mask_alone_would_let_examples_see_one_another() -> None:
    """The test above can fail: without position_ids the loss is another one."""
    model, packed = tiny_model(), pack(ROWS, 100).rows
    plain = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in packed]
    right = loss_sum(model, Collator(0)(packed))[0]
    assert (loss_sum(model, Collator(0)(plain))[0] - right).abs() > 1


def test_every_example_is_packed_once_and_whole() -> None:
    packed = pack(ROWS, 100)
    assert packed.examples == len(ROWS) and max(len(row["input_ids"]) for row in packed.rows) <= 100
    found = []
    for row in packed.rows:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == IGNORED
            found.append((row["input_ids"][start:end], row["labels"][start + 1 : end]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"][1:]) for row in ROWS)
    assert packed.lines() == ["20 examples packed into 5 rows of at most 100 tokens (82% full)"]


def test_best_fit_fills_rows() -> None:
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (6, 5, 4, 3, 2)]
    assert sorted(len(row["input_ids"]) for row in pack(rows, 10).rows) == [10, 10]
    assert len(pack(rows[:1] * 3, 6).rows) == 3
    assert pack([], 8).rows == []
    with pytest.raises(DataError, match="6 tokens does not fit into a packed row of 5"):
        pack(rows, 5)


def test_packed_batches_of_rows_of_different_length() -> None:
    batch = Collator(9)(pack([{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 2, 2)], 5).rows)
    assert batch["input_ids"].tolist() == [[5, 5, 5, 5, 5], [5, 5, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 5, 5, -100, 5], [-100, 5, -100, -100, -100]]
    assert "attention_mask" not in batch


def test_a_model_that_reads_positions_needs_no_mask() -> None:
    model = tiny_model().train()
    assert packing_for(model) == "position_ids" and model.training
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    assert packing_for(get_peft_model(tiny_model(), config)) == "position_ids"


class BlindToPositions(torch.nn.Module):
    """A model that takes masks but does not read where examples begin."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.inner, self.masked = tiny_model(), masked

    def forward(self, input_ids: Any, position_ids: Any = None, attention_mask: Any = None) -> Any:
        if not self.masked and attention_mask is not None:
            raise ValueError("attention_mask must have two dimensions")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.inner(
            input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        )


def test_other_models_get_a_mask_or_are_refused() -> None:
    assert packing_for(BlindToPositions(masked=True)) == "mask"
    with pytest.raises(TrainingError, match="BlindToPositions cannot keep packed examples apart"):
        packing_for(BlindToPositions(masked=False))
