"""An adapter written by one library loads in the other: each layer type × each option.

Tensors are compared bit for bit, on disk and in memory, the base's among them; outputs within tolerances.
`test_older_peft.py` runs this with older versions of PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.interop.reference import (
    both,
    expect_same_model,
    expect_same_tensors,
    from_reference,
    output,
    peft,
    quiet,
    randomise,
    stored,
)
from tests.tolerances import assert_close
from veneer import PeftModel
from veneer.errors import LoadMismatchError

WIDTH = 6


class Net(nn.Module):
    """Two numbered layers of two targets and a norm each, and a head."""

    def __init__(self, first: Callable[[], nn.Module], second: Callable[[], nn.Module]) -> None:
        super().__init__()
        # Below `body`: the reference does not see layer numbers at the very start of a path.
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(
            nn.ModuleDict({"first": first(), "second": second(), "norm": nn.GroupNorm(2, WIDTH)})
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0
        for layer in self.body.layers:
            h = layer["second"](torch.tanh(layer["first"](x)))
            # Lookups and linears keep their channels last, convolutions second.
            h = h.flatten(0, -2) if h.shape[-1] == WIDTH else h.flatten(2).mean(2)
            total = total + layer["norm"](h)
        return self.head(total)


def convolution(dimensions: int) -> Callable[[], nn.Module]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return lambda: Net(
        lambda: kind(4, WIDTH, kernel_size=3, stride=2, padding=1),
        lambda: kind(WIDTH, WIDTH, kernel_size=2, bias=False),
    )


@dataclass(frozen=True)
class Kind:
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]


KINDS = {
    "linear": Kind(
        lambda: Net(lambda: nn.Linear(4, WIDTH), lambda: nn.Linear(WIDTH, WIDTH, bias=False)),
        lambda: torch.randn(3, 5, 4),
    ),
    "conv1d_of_transformers": Kind(
        lambda: Net(lambda: Conv1D(WIDTH, 4), lambda: Conv1D(WIDTH, WIDTH)), lambda: torch.randn(3, 5, 4)
    ),
    "embedding": Kind(
        lambda: Net(lambda: nn.Embedding(11, WIDTH, padding_idx=0), lambda: nn.Linear(WIDTH, WIDTH)),
        lambda: torch.randint(0, 11, (3, 5)),
    ),
    "conv1d": Kind(convolution(1), lambda: torch.randn(2, 4, 9)),
    "conv2d": Kind(convolution(2), lambda: torch.randn(2, 4, 9, 8)),
    "conv3d": Kind(convolution(3), lambda: torch.randn(2, 4, 7, 6, 5)),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"second": 3, "layers.1.first": 5}},
    "rank_pattern_regex": {"rank_pattern": {r"layers\.[01]\.second": 5, "^body.layers.0.first": 2}},
    "alpha_pattern": {"alpha_pattern": {"first": 3, r".*\.1\.second": 11}},
    "both_patterns_rslora": {"rank_pattern": {"first": 5}, "alpha_pattern": {"first": 3}, "use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["first"]},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "modules_to_save_several": {"modules_to_save": ["head", "norm"]},
    "layers_to_transform": {"layers_to_transform": 1},
    "layers_to_transform_list": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layers_pattern_list": {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "exclude_modules": {"exclude_modules": ["layers.0.second"]},
    "exclude_modules_regex": {"exclude_modules": r".*\.1\.\w+"},
    "target_regex": {"target_modules": r"body\.layers\.\d\.(first|second)"},
    "target_suffix": {"target_modules": ["0.first", "body.layers.1.second"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no_init": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.25},
    "rank_above_width": {"r": 33},
    "fractional_alpha": {"lora_alpha": 2.5},
}

#: What one or both libraries refuse, with the reason. Nothing else may fail.
IMPOSSIBLE = {
    ("embedding", "lora_bias"): "a table has no bias; both refuse",
}
#: What PEFT before 0.21 does not save.
LACKING = [(kind, "bias_lora_only") for kind in KINDS if Version(peft.__version__) < Version("0.21")]
CASES = [(kind, option) for kind in KINDS for option in OPTIONS if (kind, option) not in IMPOSSIBLE]


def config(kind: str, option: str) -> dict[str, Any]:
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]} | OPTIONS[option]
    return given | ({"fan_in_fan_out": True} if kind == "conv1d_of_transformers" else {})


@pytest.mark.parametrize(("kind", "option"), CASES, ids=lambda v: v)
def test_both_ways(kind: str, option: str, tmp_path: Path) -> None:
    case = KINDS[kind]
    base = case.build().eval()
    inputs = case.inputs()
    ours, theirs = both(lambda: base, config(kind, option))

    # The same modules are adapted, the same parameters train, under the same names.
    assert {n: tuple(p.shape) for n, p in ours.named_parameters()} == {
        n: tuple(p.shape) for n, p in theirs.named_parameters()
    }
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()

    # Written by the reference, read by us.
    randomise(theirs)
    expected = output(theirs, inputs)
    assert (expected - output(base, inputs)).abs().max() > 0.05
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    if (kind, option) in LACKING:
        with pytest.raises(LoadMismatchError, match=r"PEFT before 0\.21 saves none"):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
        return
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    expect_same_model(loaded, theirs)
    assert_close(output(loaded, inputs), expected)
    loaded.save_pretrained(tmp_path / "again")
    expect_same_tensors(stored(tmp_path / "again"), stored(tmp_path / "theirs"))

    # Written by us, read by the reference.
    randomise(ours, seed=2)
    ours.save_pretrained(tmp_path / "ours")
    assert stored(tmp_path / "ours").keys() == stored(tmp_path / "theirs").keys()
    there = from_reference(base, tmp_path / "ours")
    expect_same_model(ours, there)
    assert_close(output(ours, inputs), output(there, inputs))
