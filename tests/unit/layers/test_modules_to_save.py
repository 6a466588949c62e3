"""Whole modules that adapters train: one copy answers, or each row has its own adapter's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer import AdapterNameError, LoraConfig, PeftModel, RoutingError, get_peft_model


class Scores(nn.Module):
    """A head, the answer of which has the form that is asked for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(4, 2), form

    def forward(self, x: Tensor) -> Any:
        scores = self.linear(x)
        return {"tensor": scores, "table": {"scores": scores}, "mean": scores.mean(0)}[self.form]


def two(form: str) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), Scores(form)), config, "a")
    model.add_adapter("b", config)
    return model.eval()


def test_two_copies_cannot_both_answer() -> None:
    model = two("tensor")
    head = model.get_base_model()[1]
    with pytest.raises(AdapterNameError, match="'a', 'b' each trained their own copy"):
        head.set_adapter(["a", "b"])
    assert list(head.active_adapters) == ["a"]


@pytest.mark.parametrize("form", ["table", "mean"])
def test_what_has_no_row_for_each_row_of_the_batch_cannot_be_mixed(form: str) -> None:
    x, names = torch.randn(3, 4), ["a", "b", "a"]
    assert two("tensor")(x, adapter_names=names).shape == (3, 2)
    with pytest.raises(RoutingError, match="gives no tensor with one row"):
        two(form)(x, adapter_names=names)
