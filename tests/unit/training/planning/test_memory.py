"""Estimates of memory, term by term."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.training.tiny import tiny_model
from veneer import LoraConfig
from veneer.errors import ConfigError, TargetError
from veneer.training import RunOptions
from veneer.training.planning import (
    Step,
    empty_model,
    estimate_memory,
    optimizer_bytes,
    seconds_per_step,
)
from veneer.training.run import _estimate

CONFIG = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
STEP = Step(batch_size=2, sequence_length=24)


def test_standing_terms_are_exact() -> None:
    model = tiny_model()
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    found = estimate_memory(model, CONFIG, STEP)
    per_layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    assert found.base == weights
    assert found.trainable == 2 * 4 * per_layer
    assert found.factors == found.gradients == found.adapter_bytes == 4 * found.trainable
    assert found.optimizer == 2 * found.factors
    assert found.peak > found.base + found.factors + found.optimizer + found.activations
    assert found.traced and not found.notes and found.tokens == 48
    assert not any(hasattr(m, "lora_A") for m in model.modules()) and not next(model.parameters()).is_meta
    assert json.loads(json.dumps(found.to_dict()))["peak"] == found.peak


def test_each_option_moves_what_it_is_for() -> None:
    model = tiny_model()
    plain = estimate_memory(model, CONFIG, STEP)

    def other(**options: Any) -> Any:
        return estimate_memory(model, CONFIG, replace(STEP, **options))

    again, coded, simple = other(gradient_checkpointing=True), other(quantize="nf4"), other(optim="sgd")
    assert again.activations < plain.activations / 4 and again.flops > plain.flops
    assert other(loss_chunk_size=8).logits < plain.logits / 2
    assert estimate_memory(tiny_model().bfloat16(), CONFIG, STEP).base < 0.6 * plain.base
    assert other(batch_size=4).activations > 1.9 * plain.activations
    assert other(padded=False).activations < other(padded=True).activations == plain.activations
    assert other(gradient_accumulation_steps=4).peak > plain.peak
    assert coded.base < 0.6 * plain.base and coded.notes
    assert simple.optimizer == 0 and simple.peak == plain.peak - plain.optimizer


def test_batches_and_ranks_count_once() -> None:
    """Activations are the batch's, factors the rank's: each proportional."""
    model = tiny_model()
    one, two = (
        estimate_memory(model, CONFIG, Step(batch_size=b, sequence_length=64, padded=False)) for b in (2, 4)
    )
    assert math.isclose(two.activations, 2 * one.activations, rel_tol=0.02)
    assert two.flops == 2 * one.flops and two.flops_per_token == one.flops_per_token
    r8 = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    assert estimate_memory(model, r8, STEP).factors == 2 * estimate_memory(model, CONFIG, STEP).factors


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch", 8 * 10_000),
        ("adamw_torch_fused", 8 * 10_000),
        ("sgd", 0),
        ("lion_32bit", 4 * 10_000),
        ("adafactor", 4 * 200),
        ("paged_adamw_8bit", int(2 * 10_000 * (1 + 4 / 256))),
        ("adamw_8bit", int(2 * 10_000 * (1 + 4 / 256))),
    ],
)
def test_optimizer_state(optim: str, expected: int) -> None:
    assert optimizer_bytes(optim, [torch.empty(100, 100, device="meta")]) == (expected, [])


def test_small_tensors_and_unknown_optimizers() -> None:
    assert optimizer_bytes("adamw_8bit", [torch.empty(100, device="meta")]) == (800, [])
    size, notes = optimizer_bytes("mystery", [torch.empty(100, device="meta")])
    assert size == 800 and "mystery" in notes[0]


def test_classifiers_count_their_head(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    found = estimate_memory(empty_model(tmp_path, "SEQ_CLS"), config, STEP)
    assert found.traced and found.activations > 0
    assert found.trainable == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80) + 2 * 32


def test_experts_are_traced() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    found = estimate_memory(model, LoraConfig(r=2, target_modules=["q_proj"]), STEP)
    assert found.traced and found.activations > 0


def test_a_model_that_asks_for_values_is_summed_up_roughly() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.ones(int(input_ids.sum()), 8))  # type: ignore[no-any-return]

    found = estimate_memory(Asks(), LoraConfig(r=2, target_modules=["fc"]), STEP)
    assert not found.traced and found.activations >= 48 * 16 * 4
    assert "cannot be run without values" in found.notes[0]


def test_wrong_numbers_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Step(batch_size=0, sequence_length=0, quantize="3bit")
    assert all(word in str(caught.value) for word in ("batch_size", "sequence_length", "3bit", "nf4"))
    with pytest.raises(TargetError, match="q_proj"):
        estimate_memory(tiny_model(), LoraConfig(target_modules=["q_prj"]))


def test_a_time_is_guessed_from_the_machine() -> None:
    found = estimate_memory(tiny_model(), CONFIG, STEP)
    seconds = seconds_per_step(found)
    assert 0 < seconds < 60


def test_the_step_of_a_run() -> None:
    given = {"model": "m", "data": "d", "output": "o", "batch_size": 3, "max_length": 77, "quantize": "nf4"}
    step = Step.of(RunOptions(**given), batch_size=6, device="cuda")
    assert step == Step(batch_size=6, sequence_length=77, quantize="nf4", device="cuda")
    assert Step.of(RunOptions(**given, packing=True)).padded is False


def test_a_weight_that_is_read_without_calling_its_module_is_found_before_the_first_step() -> None:
    model = tiny_model()
    block = model.model.layers[1].mlp

    class Reading(type(block)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return nn.functional.linear(gated, self.down_proj.weight)

    block.__class__ = Reading
    for steps in (1, 2):
        found = estimate_memory(model, CONFIG, replace(STEP, gradient_accumulation_steps=steps))
        assert found.unreached == ("model.layers.1.mlp.down_proj",)
        assert found.notes[0].startswith("no gradient reaches the adapter of model.layers.1.mlp.down_proj: ")
    options = RunOptions(model="m", data="d", output="o", lora_r=4)
    lines = list(_estimate(options, [{"input_ids": [1, 2, 3]}], None, model))
    assert lines[0].startswith("Estimate: ") and lines[1] == f"warning: {found.notes[0]}"
