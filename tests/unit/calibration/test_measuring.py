"""Measuring covariances and gradients: what is measured, what is cached, and a model that is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.storages import QUANTISED, torchao
from tests.tolerances import assert_close
from veneer import (
    ConfigError,
    CordaConfig,
    LoraConfig,
    LoraGAConfig,
    TargetError,
    get_peft_model,
    preprocess_corda,
    preprocess_loraga,
)
from veneer.inits import forget_statistics, statistics_of


class Net(nn.Module):
    """A linear, a transposed one and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), Conv1D(5, 8)
        self.conv = nn.Conv1d(5, 4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.second(torch.relu(self.first(x))).transpose(1, 2))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


NAMES = ["first", "second", "conv"]


def x(seed: int = 0) -> Tensor:
    return torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(seed))


def given(init: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=NAMES, init_lora_weights=init, **options)


def corda(**options: Any) -> LoraConfig:
    return given("corda", corda_config=CordaConfig(**options))


def lora_ga(**options: Any) -> LoraConfig:
    return given("lora_ga", lora_ga_config=LoraGAConfig(**options))


def run(model: nn.Module) -> None:
    """Forward, and backward where gradients are measured."""
    loss = model(x()).square().sum()
    if torch.is_grad_enabled():
        loss.backward()


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "needs": {n: p.requires_grad for n, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "attributes": {n: set(vars(m)) for n, m in model.named_modules()},
    }


def expect_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, tensor in before["values"].items():
        assert torch.equal(tensor, after["values"][name]), name
    for name, gradient in before["grads"].items():
        other = after["grads"][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name
    for part in ("needs", "modes", "hooks", "attributes"):
        assert before[part] == after[part], part


def test_covariances_are_of_the_inputs_of_each_call(tmp_path: Path) -> None:
    model, file = net(), tmp_path / "new" / "covariance.pt"
    preprocess_corda(model, corda(covariance_file=str(file)), lambda: [model(x(i)) for i in range(2)])
    stored = torch.load(file, weights_only=True)
    rows = [x(i).reshape(-1, 6) for i in range(2)]
    scaled = [r / r.max().abs() for r in rows]
    assert_close(stored["first"], sum(r.T @ r for r in scaled) / 2)  # type: ignore[arg-type]
    assert stored["conv"].shape == (15, 15) and stored["second"].shape == (8, 8)


@pytest.mark.parametrize("option", ["covariance_file", "cache_file"])
def test_files_stand_for_running_the_model(tmp_path: Path, option: str) -> None:
    config = corda(**{option: str(tmp_path / "kept.pt")})
    one, two = net(), net()
    preprocess_corda(one, config, lambda: one(x()))
    preprocess_corda(two, config)
    pair = [get_peft_model(m, config) for m in (one, two)]
    for (name, p), (_, q) in zip(*(m.named_parameters() for m in pair), strict=True):
        assert torch.equal(p, q), name


def test_another_model_may_be_measured() -> None:
    one, two = net(), net()
    preprocess_corda(one, corda(), lambda: two(x()), hooked_model=two)
    assert statistics_of(one.first) is not None and statistics_of(two.first) is None


@pytest.mark.parametrize("name", ["gradients.pt", "gradients.safetensors", "gradients"])
def test_gradients_are_the_mean_over_backward_passes(name: str, tmp_path: Path) -> None:
    model, file = net(), tmp_path / name

    def twice() -> None:
        for i in range(2):
            model(x(i)).square().sum().backward()

    preprocess_loraga(model, lora_ga(), twice, file)
    with file.open("rb") as opened:
        stored = torch.load(opened, weights_only=True)
    alone = net()
    sum(alone(x(i)).square().sum() for i in range(2)).backward()  # type: ignore[union-attr]
    for name in NAMES:
        assert_close(stored[f"{name}._peft_loraga_grad"], alone.get_submodule(name).weight.grad / 2)
    assert statistics_of(model.second).shape == (5, 8)
    again = net()
    preprocess_loraga(again, lora_ga(), lambda: pytest.fail("the file was there"), file)
    assert torch.equal(statistics_of(again.conv), statistics_of(model.conv))


@pytest.mark.parametrize(
    "store", [QUANTISED["bitsandbytes-4bit"], torchao, partial(cpu_offload, execution_device="cpu")]
)
def test_codes_and_offloaded_weights_start_from_what_was_measured_on_dense_ones(
    store: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model, file = net(), tmp_path / "gradients.pt"
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["first"], init_lora_weights="lora_ga")
    stored = net()
    stored.first = store(stored.first)
    with pytest.raises(TargetError, match=r"(quantised|offloaded)\nMeasure the model .* with a cache_file"):
        preprocess_loraga(stored, config, partial(run, stored), file)
    preprocess_loraga(model, config, partial(run, model), file)
    preprocess_loraga(stored, config, lambda: pytest.fail("the file was there"), file)
    starts = []
    for base in (model, stored):
        torch.manual_seed(0)
        starts.append(get_peft_model(base, config).get_base_model().first)
    for factor in ("lora_A", "lora_B"):
        ours, theirs = (getattr(layer, factor)["default"].weight for layer in starts)
        assert torch.equal(ours, theirs) and ours.any()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails: bool) -> None:
    model = net()
    model(x()).sum().backward()
    model.first.requires_grad_(False)
    model.second.eval()
    before = state(model)

    def go() -> None:
        run(model)
        if fails:
            raise RuntimeError("in the middle")

    for measure, config in ((preprocess_corda, corda()), (preprocess_loraga, lora_ga())):
        if fails:
            with pytest.raises(RuntimeError, match="in the middle"):
                measure(model, config, go)
        else:
            measure(model, config, go)
            for module in model.modules():
                forget_statistics(module)  # what was measured, and nothing else, is kept on the modules
        expect_same(before, state(model))


def test_the_adapter_starts_from_what_was_measured_once() -> None:
    for config, measure in ((corda(), preprocess_corda), (lora_ga(), preprocess_loraga)):
        model, base = net(), net()
        measure(model, config, partial(run, model))
        adapted = get_peft_model(model, config)
        assert torch.equal(adapted(x()), base(x()))
        assert statistics_of(model.first) is None
        with pytest.raises(ConfigError, match=r"call preprocess_"):
            adapted.add_adapter("second", config)


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(ConfigError, match="pass run_model"):
        preprocess_corda(model, corda())
    with pytest.raises(ConfigError, match="did not reach 3 of 3 layers"):
        preprocess_corda(model, corda(), lambda: None)
    with pytest.raises(ConfigError, match="not finite"):
        preprocess_corda(model, corda(), lambda: model(x() * float("nan")))
    with pytest.raises(ConfigError, match="first was called without a tensor"):
        preprocess_corda(model, corda(), lambda: model.first(input=x()))
    with pytest.raises(ConfigError, match=r"first: the covariance .* is zero"):
        preprocess_corda(model, corda(), lambda: model(x() * 0.0))
    with pytest.raises(ConfigError, match="gradients of first, second, conv are not finite"):
        preprocess_loraga(model, lora_ga(), lambda: (model(x()).sum() * float("inf")).backward())
    with pytest.raises(ConfigError, match="no gradient to 3 of 3"):
        preprocess_loraga(model, lora_ga(), lambda: None)
    with pytest.raises(ConfigError, match="'corda' is measured here"):
        preprocess_corda(model, lora_ga(), lambda: model(x()))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(TargetError, match="groups"):
        only = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights="lora_ga")
        preprocess_loraga(grouped, only, lambda: None)
    with pytest.raises(TargetError, match="on the meta device"):
        preprocess_loraga(copy.deepcopy(model).to("meta"), lora_ga(), lambda: None)
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="cannot be read"):
        preprocess_corda(model, corda(cache_file=str(bad)))
    torch.save([torch.zeros(1)], bad)
    with pytest.raises(ConfigError, match="something else"):
        preprocess_corda(model, corda(cache_file=str(bad)))
    torch.save({"other": torch.zeros(1)}, bad)
    with pytest.raises(ConfigError, match="lacks 3 of the 3"):
        preprocess_loraga(model, lora_ga(), lambda: None, bad)
    assert statistics_of(model.first) is None
