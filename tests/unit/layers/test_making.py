"""Nothing is made on torch's default device: factors are drawn on the CPU and put beside their base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from veneer import AdapterNameError, ConfigError, LoftQConfig, LoraConfig, PeftConfig, get_peft_model
from veneer.layers import wrap

STARTS: list[dict[str, Any]] = [
    {},
    {"init_lora_weights": False, "lora_bias": True, "target_modules": ["1"]},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()},
]


@pytest.mark.parametrize("options", STARTS, ids=lambda o: str(o.get("init_lora_weights", True)))
def test_a_default_device_changes_no_factor(options: dict[str, Any]) -> None:
    base = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 6))
    config = LoraConfig(**{"r": 4, "target_modules": ["0", "1"]} | options)
    torch.manual_seed(3)
    expected = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(3)
    with torch.device("meta"):  # stands for any other device: nothing can be computed there
        found = get_peft_model(copy.deepcopy(base), config)
    state = found.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_layer_by_itself_is_wrapped_with_a_lora_config_and_once_for_a_name() -> None:
    layer = wrap(nn.Linear(4, 3), LoraConfig(r=2))
    with pytest.raises(ConfigError, match="LoraConfig is needed, got dict"):
        wrap(layer, {"r": 2}, "second")
    with pytest.raises(ConfigError, match="LoraConfig is needed, got PeftConfig"):
        get_peft_model(nn.Sequential(nn.Linear(4, 3)), PeftConfig(peft_type="LORA"))
    with pytest.raises(AdapterNameError, match="'default' already"):
        wrap(layer, LoraConfig(r=2))
    assert wrap(layer, LoraConfig(r=2), "second").held_adapters == ("default", "second")
