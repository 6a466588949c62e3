"""Ten steps of a plain loop from the same factors and data: the same losses, the same factors at the end.

A bf16 base with fp32 factors is the one place where the two compute differently by design: the reference
casts activations up to the type of the factors, we cast the thin factors to the type of the activations.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.interop.reference import both, expect_same_model, peft, quiet
from tests.interop.reference_models import TINY, Tiny
from tests.tolerances import TRAINING, TRAINING_BF16, assert_close

STEPS = 10
OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "bert_classifier": {"target_modules": ["query", "value"], "use_rslora": True},
    "t5": {"target_modules": ["q", "v", "wo"], "rank_pattern": {"wo": 5}},
}


def same_start(tiny: Tiny, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Both libraries over the same base with the same factors, in training mode."""
    base = tiny.build().to(dtype)
    ours, theirs = both(lambda: base, {"task_type": tiny.task, "r": 4, "lora_alpha": 6} | options)
    ours.load_state_dict(theirs.state_dict())
    expect_same_model(ours, theirs)
    return ours.train(), theirs.train()


def train(
    model: nn.Module, optimiser: str, batches: list[dict[str, Tensor]], autocast: bool = False
) -> Tensor:
    """The losses of a plain loop."""
    step = OPTIMISERS[optimiser]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        losses.append(loss.detach().float())
        loss.backward()
        step.step()
        step.zero_grad()
    return torch.stack(losses)


def data(tiny: Tiny) -> list[dict[str, Tensor]]:
    """Two batches in turn: the losses fall."""
    several = [{"input_ids": tiny.inputs()["input_ids"]} | tiny.labels() for _ in range(2)]
    return [several[i % 2] for i in range(STEPS)]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_same(name: str, optimiser: str) -> None:
    tiny = TINY[name]
    ours, theirs = same_start(tiny, MODELS[name])
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    batches = data(tiny)
    losses = train(ours, optimiser, batches)
    assert_close(losses, train(theirs, optimiser, batches), TRAINING)
    assert losses[-2:].mean() < losses[:2].mean() - 0.01
    its = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter, before[key]) is not parameter.requires_grad, key
        if optimiser == "sgd":  # AdamW turns the sign of a gradient near zero into a whole step
            assert_close(parameter.detach(), its[key].detach(), TRAINING)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_losses_are_the_same_with_biases(options: dict[str, Any]) -> None:
    tiny = TINY["bert_classifier"]
    ours, theirs = same_start(tiny, {"target_modules": ["query", "intermediate.dense"]} | options)
    batches = data(tiny)
    assert_close(train(ours, "sgd", batches), train(theirs, "sgd", batches), TRAINING)


def test_losses_are_the_same_with_several_active_adapters() -> None:
    tiny = TINY["llama"]
    ours, theirs = same_start(tiny, MODELS["llama"])
    second = {"r": 2, "lora_alpha": 5, "target_modules": ["v_proj", "o_proj"], "init_lora_weights": False}
    ours.add_adapter("second", veneer.LoraConfig(**second))
    theirs.add_adapter("second", peft.LoraConfig(**second))
    ours.load_state_dict(theirs.state_dict())
    ours.set_adapter(["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    batches = data(tiny)
    assert_close(train(ours, "sgd", batches), train(theirs, "sgd", batches), TRAINING)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_on_a_bf16_base_lie_within_its_rounding(name: str) -> None:
    tiny = TINY[name]
    ours, theirs = same_start(tiny, MODELS[name], torch.bfloat16)
    kinds = {p.dtype for n, p in ours.named_parameters() if "lora_" in n}
    assert kinds == {torch.float32}
    batches = data(tiny)
    losses = train(ours, "sgd", batches)
    assert_close(losses, train(theirs, "sgd", batches), TRAINING_BF16)
    assert losses[-2:].mean() < losses[:2].mean() - 0.01


def test_losses_under_autocast_lie_within_its_rounding() -> None:
    tiny = TINY["llama"]
    ours, theirs = same_start(tiny, MODELS["llama"])
    batches = data(tiny)
    losses = train(ours, "sgd", batches, autocast=True)
    assert_close(losses, train(theirs, "sgd", batches, autocast=True), TRAINING_BF16)
    assert losses[-2:].mean() < losses[:2].mean() - 0.01


def test_gradient_checkpointing_gives_the_same_losses() -> None:
    tiny = TINY["llama"]
    base = tiny.build()
    # transformers 5 renamed the method and deprecates the name that older versions have.
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    options = MODELS["llama"] | {"task_type": tiny.task}
    ours, theirs = both(lambda: base, options)
    ours.load_state_dict(theirs.state_dict())
    batches = data(tiny)
    assert_close(train(ours.train(), "sgd", batches), train(theirs.train(), "sgd", batches), TRAINING)


def test_dropout_zero_and_evaluation_draw_no_random_numbers() -> None:
    """So a run's random numbers are those of the base alone, in both libraries."""
    tiny = TINY["llama"]
    ours, theirs = same_start(tiny, MODELS["llama"] | {"lora_dropout": 0.3})
    batch = data(tiny)[0]
    for model in (ours.eval(), theirs.eval()):
        state = torch.get_rng_state()
        model(**batch)
        assert torch.equal(state, torch.get_rng_state())
    ours, theirs = same_start(tiny, MODELS["llama"])
    for model in (ours, theirs):
        state = torch.get_rng_state()
        model(**batch)
        assert torch.equal(state, torch.get_rng_state())


def test_dropout_has_the_reference_s_mean_and_spread() -> None:
    """Each library draws its own numbers, so the branch's output is compared by its first two moments."""
    base = nn.Sequential(nn.Linear(64, 8, bias=False))
    options = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["0"],
        "lora_dropout": 0.4,
        "init_lora_weights": False,
    }
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**options))
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(64).expand(20_000, 64)
    with torch.no_grad():
        found, expected = ours.train()(x), theirs.train()(x)
    error = expected.std(0) / 20_000**0.5
    assert ((found.mean(0) - expected.mean(0)).abs() < 6 * error).all()
    assert ((found.std(0) / expected.std(0) - 1).abs() < 0.05).all()
