"""Types that are known and not adapted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router

from tests.tolerances import assert_close
from veneer import LoraConfig, TargetError, get_peft_model
from veneer.layers import REFUSED, find, refusal, wrap


def test_every_refused_type_exists_and_has_no_layer() -> None:
    for name, reason in REFUSED.items():
        module, _, cls = name.rpartition(".")
        kind = getattr(__import__(module, fromlist=[cls]), cls)
        made = kind.__new__(kind)
        assert f"{kind.__module__}.{kind.__qualname__}" == name
        assert find(made) is None and refusal(made) == reason
    with pytest.raises(TargetError, match="reduces over bags"):
        wrap(nn.EmbeddingBag(3, 3), LoraConfig())
    with pytest.raises(TargetError, match="no layer for this type"):
        wrap(nn.LayerNorm(3), LoraConfig())


def test_a_router_that_gives_several_tensors_is_adapted_by_its_weight() -> None:
    """A branch beside it could not be added to a tuple. Rows of a mixed batch keep their own."""
    torch.manual_seed(0)
    net = nn.Sequential(Llama4Router(Llama4TextConfig(hidden_size=6, num_local_experts=4)))
    with pytest.raises(TargetError, match="name its weight in target_parameters"):
        get_peft_model(net, LoraConfig(target_modules=["0"]))
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
    model = get_peft_model(net, config, "a")
    model.add_adapter("b", config)
    x = torch.randn(2, 6)
    mixed = model(x, adapter_names=["b", "a"])
    for row, name in enumerate("ba"):
        model.set_adapter(name)
        for both, alone in zip(mixed, model(x[row : row + 1]), strict=True):
            assert_close(both[row : row + 1], alone)
