"""`check_training`: what one backward pass reaches; adapters that change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer import LoraConfig, TrainingError, VeneerError, check_training, get_peft_model
from veneer.checks import check_adapters_act


class Net(nn.Module):
    """Two linears that are called, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)
        self.idle = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., 6) -> (..., 3)."""
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def adapted(*names: str, **options: object) -> nn.Module:
    return get_peft_model(Net(), LoraConfig(r=2, lora_alpha=6, target_modules=list(names), **options))


def test_fresh_adapter_is_in_reach_though_a_gets_zeros_at_first() -> None:
    result = check_training(adapted("first", "second"), torch.randn(4, 6))
    assert result.ok
    assert len(result.trained) == 4


def test_module_that_is_never_called_is_named() -> None:
    result = check_training(adapted("first", "idle"), torch.randn(4, 6))
    assert not result.ok
    assert {name.split(".")[2] for name in result.silent} == {"idle"}
    assert "called" in str(result)


def test_frozen_adapter_is_an_error_that_names_the_way_out() -> None:
    model = adapted("first")
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(TrainingError, match="is_trainable=True"):
        check_training(model, torch.randn(4, 6))


def test_disabled_adapter_is_an_error() -> None:
    model = adapted("first")
    with model.disable_adapter(), pytest.raises(TrainingError, match="disabled"):
        check_training(model, torch.randn(4, 6))


def test_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nan"):
        check_training(adapted("first"), torch.full((4, 6), float("nan")))


def test_gradients_mode_and_random_state_are_as_before() -> None:
    model = adapted("first", lora_dropout=0.5).eval()
    kept = torch.ones(2, 6)
    parameter = model.get_parameter("base_model.model.first.lora_A.default.weight")
    parameter.grad = kept
    state = torch.get_rng_state()
    check_training(model, torch.randn(0, 6).new_ones(4, 6))
    assert parameter.grad is kept
    assert not any(m.training for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_trainable_parameters_outside_adapters_are_named() -> None:
    model = adapted("first")
    model.get_base_model().second.requires_grad_(True)
    result = check_training(model, torch.randn(4, 6))
    assert len(result.other) == 2


def test_batches_and_losses_of_every_form() -> None:
    model = adapted("first")
    x = torch.randn(4, 6)
    for batch in (x, (x,), {"x": x}):
        assert check_training(model, batch).ok
    assert check_training(model, x, lambda m, b: m(b).sum()).ok


class Normed(Net):
    """With running statistics, a buffer that forward replaces, and one that is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, 6) -> (T, 3)."""
        self.seen = self.seen + len(x)
        return self.second(self.norm(self.first(x)))  # type: ignore[no-any-return]


def test_buffers_are_as_before() -> None:
    model = get_peft_model(Normed(), LoraConfig(r=2, lora_alpha=6, target_modules=["first"])).train()
    model(torch.randn(4, 6))
    held = dict(model.named_buffers())
    values = {name: b.clone() for name, b in held.items()}
    assert len(held) == 4
    check_training(model, torch.randn(4, 6))
    for name, buffer in model.named_buffers():
        assert buffer is held[name], name
        assert torch.equal(buffer, values[name]), name
    with pytest.raises(TrainingError, match="nan"):
        check_training(model, torch.full((4, 6), float("nan")))
    assert all(torch.equal(b, values[name]) for name, b in model.named_buffers())


def test_random_states_of_cuda_are_put_back_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    states, calls = [torch.zeros(16, dtype=torch.uint8)], []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", calls.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    check_training(adapted("first"), torch.randn(4, 6))
    assert calls == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    check_training(adapted("first"), torch.randn(4, 6))
    assert len(calls) == 1 and calls[0] is states


def test_an_output_without_a_loss_is_an_error_that_names_the_way_out() -> None:
    model = adapted("first", "second")
    model.register_forward_hook(lambda module, args, output: {"scores": output})
    with pytest.raises(TrainingError, match=r"neither loss nor logits.*pass loss="):
        check_training(model, torch.randn(4, 6))
    assert check_training(model, torch.randn(4, 6), loss=lambda m, x: m(x)["scores"].sum()).ok


def idle(model: Any) -> str:
    """What the refusal says; empty if there is none."""
    try:
        check_adapters_act(model, {name: f"<{name}>" for name in model.peft_config})
    except VeneerError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["second"]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_an_adapter_acts_once_one_of_its_tensors_moves(options: Any) -> None:
    model: Any = adapted("first", **options)
    model.add_adapter("drawn", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    assert idle(model) == "<default> changes nothing: all its updates are zero"
    for name, parameter in model.named_parameters():
        # While B is zero, A moves nothing.
        if "default" in name and "lora_A" not in name:
            before = parameter.detach().clone()
            parameter.data += 0.5
            assert not idle(model), name
            parameter.data.copy_(before)


def test_trained_tokens_act_once_they_are_not_those_of_the_base() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    config = LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1]})
    model: Any = get_peft_model(net, config)
    assert idle(model)
    next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n).data += 1
    assert not idle(model)
