"""Training mode of what an adapter brings: the same as of the peft library, whatever mode the base is in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from tests.interop.reference import peft, quiet


class Base(nn.Module):
    """A dropout of its own, layers that are adapted, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(8, 4)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (n, 4) -> (n, 3)."""
        return self.head(self.down(self.drop(self.up(x).relu())))


def base(training: bool) -> nn.Module:
    torch.manual_seed(0)
    return Base().train(training)


OPTIONS = {"r": 2, "target_modules": ["up", "down"], "lora_dropout": 0.5, "modules_to_save": ["head"]}


def modes(model: nn.Module) -> dict[str, bool]:
    """The mode of the model, of what it wraps, of its layers, and of each adapter's dropout."""
    containers = ("lora_dropout", "lora_A", "lora_B", "modules_to_save", "_undo")
    result = {}
    for name, module in model.named_modules():
        last = name.split(".")
        if last[-1] not in containers and "lora_A" not in last and "lora_B" not in last:
            result[name] = module.training
    return result


def get_peft_model(library: Any, training: bool, saved: Path) -> nn.Module:
    return library.get_peft_model(base(training), library.LoraConfig(**OPTIONS))


def add_adapter(library: Any, training: bool, saved: Path) -> nn.Module:
    model = get_peft_model(library, training, saved)
    model.add_adapter("second", library.LoraConfig(**OPTIONS))
    return model


def add_adapter_after_eval(library: Any, training: bool, saved: Path) -> nn.Module:
    model = get_peft_model(library, training, saved).eval()
    model.add_adapter("second", library.LoraConfig(**OPTIONS))
    return model


def inject(library: Any, training: bool, saved: Path) -> nn.Module:
    options = {key: value for key, value in OPTIONS.items() if key != "modules_to_save"}
    return library.inject_adapter_in_model(library.LoraConfig(**options), base(training))


def from_pretrained(library: Any, training: bool, saved: Path) -> nn.Module:
    return library.PeftModel.from_pretrained(base(training), saved, is_trainable=True)


def from_pretrained_for_inference(library: Any, training: bool, saved: Path) -> nn.Module:
    return library.PeftModel.from_pretrained(base(training), saved)


def load_adapter(library: Any, training: bool, saved: Path) -> nn.Module:
    model = get_peft_model(library, training, saved)
    model.load_adapter(saved, "second", is_trainable=True)
    return model


def load_adapter_for_inference(library: Any, training: bool, saved: Path) -> nn.Module:
    model = get_peft_model(library, training, saved)
    model.load_adapter(saved, "second")
    return model


DOORS: list[Callable[[Any, bool, Path], nn.Module]] = [
    get_peft_model,
    add_adapter,
    add_adapter_after_eval,
    inject,
    from_pretrained,
    from_pretrained_for_inference,
    load_adapter,
    load_adapter_for_inference,
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    get_peft_model(peft, False, tmp_path).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_modes_are_those_of_the_reference(
    door: Callable[[Any, bool, Path], nn.Module], training: bool, saved: Path
) -> None:
    ours = modes(door(veneer, training, saved))
    with quiet():
        theirs = modes(door(peft, training, saved))
    common = set(ours) & set(theirs)
    assert {name for name in theirs if "lora_dropout" in name} <= common
    different = {name: theirs[name] for name in common if ours[name] is not theirs[name]}
    # Where an adapter that trains comes to a layer in evaluation, the layer says so; there it does not.
    if door is add_adapter_after_eval:
        assert different == {"base_model.model.up": False, "base_model.model.down": False}
    else:
        # A wrapper of a module that is trained whole is in its module's mode: the wrapper itself has none.
        assert set(different) <= {"base_model.model.head"}


@pytest.mark.parametrize("library", [veneer, peft], ids=["veneer", "peft"])
def test_dropout_acts_on_a_base_in_evaluation(library: Any, saved: Path) -> None:
    x = torch.ones(64, 4)
    for door, acts in [(from_pretrained, True), (from_pretrained_for_inference, False), (inject, True)]:
        model = door(library, False, saved)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.5)
        assert torch.equal(model(x), model(x)) is not acts
        twin = copy.deepcopy(model).eval()
        assert torch.equal(twin(x), twin(x))
        if acts:
            assert not torch.equal(twin.train()(x), twin(x))
