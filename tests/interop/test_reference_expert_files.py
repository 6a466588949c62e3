"""An adapter of a stack of experts, written by one library and read by the other, whatever PEFT's version."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from tests.interop.reference import both, from_reference, output, peft, quiet, randomise
from tests.tolerances import assert_close
from veneer import PeftModel
from veneer.errors import VeneerWarning
from veneer.tools import convert_adapter

EXPERTS, IN, OUT = 3, 5, 7
#: PEFT took the axes of a stack for (experts, in, out) at first, whatever the base.
LAYOUT = "peft-0.18" if Version(peft.__version__) < Version("0.19.1") else "peft"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, OUT, IN))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return x @ self.down_proj[chosen].T


class Mixture(nn.Module):
    """Every row goes through the expert of its number."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.mlp.experts(row, number) for number, row in enumerate(x)])


def test_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mixture().eval()
    x = torch.randn(EXPERTS, 4, IN)
    options = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    ours, theirs = both(lambda: base, options)

    expected = output(randomise(theirs), x)
    assert (expected - output(base, x)).abs().max() > 0.05
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    says = "its experts are in the layout peft-0.18" if LAYOUT != "peft" else ""
    with pytest.warns(VeneerWarning, match=says) if says else contextlib.nullcontext():
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert_close(output(loaded, x), expected)

    expected = output(randomise(ours, seed=2), x)
    ours.save_pretrained(tmp_path / "ours")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')  # stacks are (experts, out, in)
    convert_adapter(tmp_path / "ours", tmp_path / "converted", layout=LAYOUT, base=tmp_path)
    assert_close(output(from_reference(base, tmp_path / "converted"), x), expected)
