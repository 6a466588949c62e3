"""Stacks of experts under the names that each expert's projections had as modules."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from veneer import LoraConfig, PeftModel, TargetError, VeneerWarning, get_peft_model

pytestmark = pytest.mark.filterwarnings("error::veneer.VeneerWarning")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))


class Block(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.gate, self.experts = Router(), Experts()
        if shared:
            self.gate_proj = nn.Linear(4, 4)


class Mixture(nn.Module):
    """Two layers of experts, as a model of some type."""

    def __init__(self, model_type: str = "qwen3_moe", shared: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.layers = nn.ModuleList(Block(shared) for _ in range(2))


def adapted(model: nn.Module, **options: Any) -> tuple[LoraConfig, set[str]]:
    """The completed configuration, and the last names of what is adapted."""
    wrapped: PeftModel = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **options))
    layers = [m for _, m in wrapped.named_modules() if getattr(m, "held_adapters", ())]
    names = {getattr(m, "parameter_name", "module") for m in layers}
    return wrapped.peft_config["default"], names


def test_all_linear_takes_experts_and_router() -> None:
    config, names = adapted(Mixture(), target_modules="all-linear")
    assert names == {"module", "weight", "gate_up_proj", "down_proj"}
    assert config.target_modules == {"q_proj"}
    assert config.target_parameters == ["down_proj", "gate.weight", "gate_up_proj"]
    assert config.rank_pattern == {r".*\.gate_up_proj": 4}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 6}


def test_rank_and_strength_of_a_stack_may_be_given() -> None:
    own = {"gate_up_proj": 5}
    config, _ = adapted(Mixture(), target_modules="all-linear", rank_pattern=own)
    assert config.rank_pattern == own and not config.alpha_pattern
    wrapped = get_peft_model(Mixture(), LoraConfig(r=2, target_modules="all-linear", use_rslora=True))
    scalings = {m.scaling["default"] for m in wrapped.modules() if getattr(m, "held_adapters", ())}
    assert max(scalings) - min(scalings) < 1e-9


@pytest.mark.parametrize("exclude", [["experts"], r".*\.experts"])
def test_excluded_experts_are_left_alone(exclude: Any) -> None:
    _, names = adapted(Mixture(), target_modules="all-linear", exclude_modules=exclude)
    assert names == {"module", "weight"}


def test_what_parameters_cannot_have_is_refused_with_the_way_out() -> None:
    model = Mixture()
    before = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(TargetError, match=r"exclude_modules=\['experts', 'gate'\]") as caught:
        get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.1))
    assert "gate_up_proj" in str(caught.value) and "lora_dropout=0" in str(caught.value)
    assert before == {name: id(m) for name, m in model.named_modules()}
    options = {"target_modules": "all-linear", "lora_dropout": 0.1, "exclude_modules": ["experts", "gate"]}
    assert adapted(model, **options)[1] == {"module"}


@pytest.mark.parametrize(
    ("targets", "parameters", "left"),
    [
        (["gate_proj", "up_proj", "down_proj", "q_proj"], ["down_proj", "gate_up_proj"], {"q_proj"}),
        (["experts.down_proj"], ["down_proj"], set()),
        ("gate", ["gate.weight"], []),
        (r".*experts\.(gate|up)_proj", ["gate_up_proj"], []),
        (
            r".*\.layers\.1\..*(gate|up|q)_proj",
            ["1.experts.gate_up_proj"],
            r".*\.layers\.1\..*(gate|up|q)_proj",
        ),
    ],
)
def test_old_names_mean_the_stacks_and_this_is_said(targets: Any, parameters: list[str], left: Any) -> None:
    model = nn.ModuleDict({"model": Mixture()})
    model.config = model["model"].config
    with pytest.warns(VeneerWarning, match="are adapted in their place, as in PEFT") as caught:
        config, _ = adapted(model, target_modules=targets)
    assert len(caught) == 1
    assert (config.target_parameters, config.target_modules) == (parameters, left)


def test_half_a_stack_is_refused() -> None:
    with pytest.raises(TargetError, match=r"gate_proj without up_proj.*Name both"):
        adapted(Mixture(), target_modules=["gate_proj", "down_proj"])
    with pytest.raises(TargetError, match="w3 without w1"):
        adapted(Mixture("mixtral"), target_modules=["w3"])


@pytest.mark.parametrize(
    ("model_type", "shared", "targets", "said"),
    [
        ("other", False, "all-linear", r"leaves out the experts at layers.0.experts and 1 more"),
        ("other", False, ["q_proj", "up_proj"], r"\['q_proj', 'up_proj'\] leaves out the experts"),
        ("qwen3_moe", True, ["gate_proj"], "leaves out the experts"),
        ("qwen3_moe", True, "all-linear", r"leaves out layers.0.gate_proj, layers.1.gate_proj"),
    ],
)
def test_what_is_left_out_is_said(model_type: str, shared: bool, targets: Any, said: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VeneerWarning)
        _, names = adapted(Mixture(model_type, shared), target_modules=targets)
    assert any(re.search(said, str(entry.message)) for entry in caught)
    assert ("gate_up_proj" in names) == (model_type != "other" and targets == "all-linear")


def test_stacks_that_are_named_are_not_said_to_be_left_out() -> None:
    options = {"target_modules": "all-linear", "target_parameters": ["gate_up_proj", "down_proj"]}
    assert adapted(Mixture("other"), **options)[1] == {"module", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("targets", ["all-linear", []])
def test_parameters_lie_in_layers_too(targets: Any) -> None:
    options = {"target_parameters": ["experts.gate_up_proj"], "layers_to_transform": [1]}
    wrapped = get_peft_model(Mixture(), LoraConfig(target_modules=targets, **options))
    assert not [n for n, _ in wrapped.named_parameters() if "lora_A" in n and "layers.0" in n]
    config = wrapped.peft_config["default"]
    assert "1.experts.gate_up_proj" in config.target_parameters


def test_a_dry_run_changes_no_configuration() -> None:
    config = LoraConfig(target_modules="all-linear")
    made = veneer.plan(Mixture(), config)
    assert {spec.parameter for spec in made.specs} == {"", "weight", "gate_up_proj", "down_proj"}
    assert config.target_parameters is None and not config.rank_pattern


def test_a_parameter_of_the_model_itself_is_refused_with_every_other_fault() -> None:
    model = Mixture()
    model.table = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(TargetError, match="the model itself holds it, which nothing wraps"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=["table"]))
    assert not any("lora" in name for name, _ in model.named_modules())
