"""Budgets, and what is proposed to keep to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.training.tiny import tiny_model
from veneer import LoraConfig
from veneer.errors import ConfigError, TrainingError
from veneer.training.planning import Budget, Step, estimate_memory, parse_budget, propose

CONFIG = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
STEP = Step(batch_size=8, sequence_length=64)


@pytest.mark.parametrize(
    ("text", "memory", "share"),
    [
        ("24GB", 24 * 10**9, None),
        ("24 gib", 24 * 2**30, None),
        ("1.5G", 15 * 10**8, None),
        ("800MB", 8 * 10**8, None),
        ("2000000", 2 * 10**6, None),
        ("1%", None, 0.01),
        (" 0.5 %", None, 0.005),
    ],
)
def test_budgets_are_read(text: str, memory: int | None, share: float | None) -> None:
    found = parse_budget(text)
    assert (found.memory, found.share) == (memory, share)


@pytest.mark.parametrize("text", ["foo", "", "0%", "-1%", "nan%", "101%", "24XB", "GB", "24", "1e9", "-3GB"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        parse_budget(text)


def peak(**options: Any) -> int:
    return estimate_memory(tiny_model(), CONFIG, replace(STEP, **options)).peak


def test_memory_is_kept_to_by_giving_up_as_little_as_needed() -> None:
    model = tiny_model()
    free = propose(model, CONFIG, f"{2 * peak()}B", STEP) if peak() > 10**6 else None
    assert free is not None and not free.given_up and free.step.batch_size == 8
    tight = propose(model, CONFIG, f"{int(1.1 * peak(gradient_checkpointing=True))}B", STEP)
    assert tight.step.gradient_checkpointing and tight.step.batch_size == 8
    assert len(tight.given_up) == 1 and tight.config.r == 16
    tighter = propose(model, CONFIG, f"{int(1.2 * peak(gradient_checkpointing=True, batch_size=4))}B", STEP)
    assert tighter.step.batch_size * tighter.step.gradient_accumulation_steps == 8
    assert tighter.estimate.peak < 1.2 * peak(gradient_checkpointing=True, batch_size=4)


def test_the_base_is_quantised_then_the_rank_falls_then_the_targets() -> None:
    model, config = tiny_model(), replace(CONFIG, r=4, lora_alpha=8)
    small = {"gradient_checkpointing": True, "loss_chunk_size": 256, "batch_size": 1}
    fixed = {"gradient_checkpointing", "loss_chunk_size", "batch_size"}
    step = replace(STEP, **small)
    given_up = [
        propose(
            model, config, Budget("just enough", memory=int(estimate.peak / 0.95) + 1), step, fixed
        ).given_up
        for estimate in (
            estimate_memory(model, config, replace(step, quantize="nf4")),
            estimate_memory(model, replace(config, r=2), replace(step, quantize="nf4")),
            estimate_memory(
                model,
                replace(config, r=1, target_modules=["q_proj", "v_proj"]),
                replace(step, quantize="nf4"),
            ),
        )
    ]
    bits = "the base is kept in 4 bits (nf4)"
    assert given_up[:2] == [(bits,), (bits, "rank 2 instead of 4")]
    assert given_up[2][-1] == "fewer targets"


def test_what_is_given_is_not_changed() -> None:
    limit = f"{int(1.1 * peak(gradient_checkpointing=True))}B"
    held = {"gradient_checkpointing", "batch_size", "quantize", "r", "target_modules", "loss_chunk_size"}
    with pytest.raises(TrainingError) as caught:
        propose(tiny_model(), CONFIG, limit, STEP, fixed=held)
    assert "Kept as given: batch_size" in str(caught.value) and "smallest settings found take" in str(
        caught.value
    )


def test_what_cannot_fit_says_why() -> None:
    big = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    with pytest.raises(TrainingError, match=r"the base alone takes .* even in 4 bits"):
        propose(model, big, "1MB", STEP)


def test_a_share_of_the_parameters_gives_the_rank_and_keeps_the_scaling() -> None:
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    found = propose(model, CONFIG, "5%", STEP)
    assert found.estimate.trainable <= 0.05 * total < found.estimate.trainable * (1 + 1 / found.config.r)
    assert found.config.lora_alpha == 2 * found.config.r and found.given_up
    few = propose(model, CONFIG, "1.5%", STEP)
    assert few.config.target_modules != "all-linear" and "fewer targets" in few.given_up
    with pytest.raises(TrainingError, match="the smallest adapter found"):
        propose(model, CONFIG, "0.01%", STEP)
