"""Replicated layers: what cannot be replicated, or not twice, is refused and nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import assert_close
from veneer import ConfigError, LoraConfig, TargetError, get_peft_model


class Net(nn.Module):
    """Three layers where replication looks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


RANGES = [[0, 3], [1, 3]]


def config(ranges: list[list[int]] | None, **more: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=r"layers\.\d+", layer_replication=ranges, **more)


def test_a_second_adapter_has_the_layers_of_the_first() -> None:
    model = get_peft_model(Net(), config(RANGES))
    model.add_adapter("same", config(RANGES))
    with pytest.raises(TargetError, match=r"replicated as \[\[0, 3\], \[1, 3\]\] for another adapter"):
        model.add_adapter("other", config([[0, 2], [0, 2]]))
    assert list(model.peft_config) == ["default", "same"] and len(model.get_base_model().layers) == 5


def test_layers_that_hold_adapters_are_not_repeated() -> None:
    model = get_peft_model(Net(), config(None))
    with pytest.raises(TargetError, match="repeat layers that hold adapters"):
        model.add_adapter("other", config(RANGES))
    assert list(model.peft_config) == ["default"] and len(model.get_base_model().layers) == 3


def test_biases_that_layers_share_are_not_trained() -> None:
    net = Net()
    with pytest.raises(ConfigError, match="bias must be 'none'"):
        get_peft_model(net, config(RANGES, bias="all"))
    assert len(net.layers) == 3


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(TargetError, match="no list of layers"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(RANGES))


@torch.no_grad()
def test_merged_layers_share_no_parameter_and_compute_the_same() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net(), config(RANGES, init_lora_weights=False)).eval()
    x = torch.randn(3, 4)
    before = model(x)
    plain = model.merge_and_unload(untie=True)
    assert_close(plain(x), before)
    parameters = [parameter for layer in plain.layers for parameter in layer.parameters()]
    assert len(parameters) == len({parameter.data_ptr() for parameter in parameters}) == 10
