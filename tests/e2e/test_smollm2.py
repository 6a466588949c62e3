"""A pretrained language model learns something real through an adapter, and keeps it through a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.programs import program
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.training import (
    Collator,
    TrainOptions,
    answer_loss,
    encode,
    generate_answers,
    load_base,
    prompt_ids,
    train,
)

pytestmark = [pytest.mark.model, pytest.mark.slow]

DATA, TOOL = program("examples/data.py"), program("tools/smollm2.py")
PARTS = {name: [DATA.record_of(mail) for mail in part] for name, part in DATA.headers().items()}
SHORT = {name: sorted(records, key=lambda r: len(r["prompt"])) for name, records in PARTS.items()}


def heldout_loss(model: Any, tokenizer: Any) -> float:
    rows = encode(SHORT["heldout"][:4], tokenizer).rows
    return answer_loss(model, rows, Collator(tokenizer.pad_token_id), batch_size=4)


def test_it_learns_in_four_steps_and_keeps_it(smollm2: Path, tmp_path: Path) -> None:
    base, tokenizer = load_base(smollm2)
    assert next(base.parameters()).dtype == torch.bfloat16
    before = heldout_loss(base, tokenizer)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = encode(SHORT["train"][:16], tokenizer).rows
    options = TrainOptions(learning_rate=1e-3, max_steps=4, batch_size=4, lr_scheduler_type="constant")
    metrics = train(model, tokenizer, rows, tmp_path / "adapter", options)
    losses = [entry["loss"] for entry in metrics["losses"]]
    after = heldout_loss(model, tokenizer)
    assert losses[-1] < 0.7 * losses[0]
    assert after < 0.7 * before

    fresh, tokenizer = load_base(smollm2)
    reloaded: Any = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert heldout_loss(reloaded, tokenizer) == after
    prompts = [prompt_ids(record["prompt"], tokenizer) for record in SHORT["heldout"][:2]]
    answers = generate_answers(reloaded, tokenizer, prompts, max_new_tokens=8)
    assert answers == generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    with reloaded.disable_adapter():
        assert heldout_loss(reloaded, tokenizer) == before
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 25_000_000


def test_conversion_is_the_same_each_time(smollm2: Path, models: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    TOOL.convert_gguf(models / TOOL.GGUF, again)
    for file in sorted(smollm2.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
