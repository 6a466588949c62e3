"""Adapters written by an earlier version of Veneer still mean the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.golden.earlier import DATA
from tests.golden.earlier import EARLIER as CASES
from tests.golden.models import output
from tests.tolerances import assert_close
from veneer import PeftModel
from veneer.files.layout import SAFETENSORS_NAME


@pytest.fixture(params=sorted(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_case_has_its_files_and_no_file_is_without_a_case() -> None:
    assert {place.name for place in DATA.iterdir()} == set(CASES)


@torch.no_grad()
def test_outputs_are_what_they_were(name: str, golden: dict[str, Tensor], base: nn.Module) -> None:
    inputs = golden["input"]
    assert_close(output(base, inputs), golden["output.base"])
    model = PeftModel.from_pretrained(base, DATA / name).eval()
    assert_close(output(model, inputs), golden["output.adapter"])
    assert (golden["output.adapter"] - golden["output.base"]).abs().max() > 0.1
    merged = model.merge_and_unload().eval()
    assert_close(output(merged, inputs), golden["output.adapter"])


@torch.no_grad()
def test_saving_again_gives_the_same_tensors(name: str, base: nn.Module, tmp_path: Path) -> None:
    PeftModel.from_pretrained(base, DATA / name).save_pretrained(tmp_path)
    ours, before = (load_file(place / SAFETENSORS_NAME) for place in (tmp_path, DATA / name))
    assert ours.keys() == before.keys()
    assert all(
        torch.equal(ours[key], tensor) and ours[key].dtype is tensor.dtype for key, tensor in before.items()
    )
