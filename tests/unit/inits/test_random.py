"""The random starts, each compared with the reference library's."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer import LoraConfig
from veneer.errors import ConfigError
from veneer.inits import InitRequest, find
from veneer.spec import LoraSpec

#: Two samples of one distribution differ by more than this with probability 1e-6 (Smirnov's bound).
FALSE_ALARM = 1e-6


def distance(one: Tensor, two: Tensor) -> float:
    """The largest difference of the two empirical distribution functions."""
    both = torch.cat([one, two]).sort().values
    first = torch.searchsorted(one.sort().values, both, right=True) / len(one)
    second = torch.searchsorted(two.sort().values, both, right=True) / len(two)
    return float((first - second).abs().max())


def limit(one: Tensor, two: Tensor) -> float:
    n, m = len(one), len(two)
    return math.sqrt(-math.log(FALSE_ALARM / 2) / 2) * math.sqrt((n + m) / (n * m))


def base(kind: str) -> nn.Module:
    return {
        "linear": lambda: nn.Linear(200, 120),
        "conv1d": lambda: Conv1D(120, 200),
        "conv": lambda: nn.Conv2d(24, 60, 3),
        "embed": lambda: nn.Embedding(300, 120),
    }[kind]()


def factors(library: Any, kind: str, seed: int, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"target": base(kind)})
    config = library.LoraConfig(
        r=16, lora_alpha=24, target_modules=["target"], fan_in_fan_out=kind == "conv1d", **options
    )
    adapted = library.get_peft_model(model, config)
    found = {n: p.detach().flatten() for n, p in adapted.named_parameters() if "lora_" in n}
    return {n.rpartition("target.")[2]: p for n, p in found.items()}


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv", "embed"])
@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_each_start_is_distributed_as_the_references(kind: str, init: bool | str) -> None:
    ours = factors(veneer, kind, 1, init_lora_weights=init)
    theirs = factors(peft, kind, 2, init_lora_weights=init)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        if not theirs[name].any():
            assert not values.any(), name
        else:
            assert distance(values, theirs[name]) < limit(values, theirs[name]), name


def test_the_distance_tells_starts_apart() -> None:
    default = factors(veneer, "linear", 1)["lora_A.default.weight"]
    gaussian = factors(veneer, "linear", 1, init_lora_weights="gaussian")["lora_A.default.weight"]
    assert distance(default, gaussian) > limit(default, gaussian)
    assert distance(default, 1.25 * default) > limit(default, default)


def test_biases_of_b() -> None:
    assert not factors(veneer, "linear", 1, lora_bias=True)["lora_B.default.bias"].any()
    ours = factors(veneer, "linear", 1, lora_bias=True, init_lora_weights=False)["lora_B.default.bias"]
    theirs = factors(peft, "linear", 2, lora_bias=True, init_lora_weights=False)["lora_B.default.bias"]
    assert distance(ours, theirs) < limit(ours, theirs)


def request(**options: Any) -> InitRequest:
    spec = LoraSpec("layers.0.q", "default", 4, 6.0)
    values = {"spec": spec, "shape_a": (4, 9), "shape_b": (7, 4), "bias": False, "lookup": False, "seed": 3}
    return InitRequest(matrix=lambda: torch.zeros(7, 9), **{**values, **options})


@pytest.mark.parametrize("name", [True, False, "gaussian"])
def test_a_start_depends_on_the_draw_and_the_name_only(name: bool | str) -> None:
    init = find(name)
    torch.manual_seed(0)
    first = init(request())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(init(request()).a, first.a)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert not torch.equal(init(request(seed=4)).a, first.a)
    other = LoraSpec("layers.1.q", "default", 4, 6.0)
    assert not torch.equal(init(request(spec=other)).a, first.a)


def test_only_exact_values_name_a_start() -> None:
    assert find(True) is not find(False)
    for value in (1, 0, "True", "GAUSSIAN", "nonsense"):
        with pytest.raises(ConfigError, match="loftq"):
            find(value)


def test_names_are_case_insensitive_in_a_configuration() -> None:
    for name in ("Gaussian", "gaussian"):
        assert LoraConfig(init_lora_weights=name).init_lora_weights.lower() == "gaussian"
        factors(veneer, "linear", 1, init_lora_weights=name)


def test_shapes_of_a_fresh_start_hold_for_ranks_beyond_the_layer() -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(
        nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=64, lora_alpha=6, target_modules=["0"])
    )
    assert model(torch.ones(3)).shape == (2,)
    assert float(model.base_model.model[0].lora_A["default"].weight.detach().abs().max()) <= 1 / math.sqrt(3)
