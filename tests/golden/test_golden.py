"""Adapters that PEFT wrote, and the outputs that it computed with them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.configurations import read_config
from tests.golden.models import CASES, output
from tests.tolerances import assert_close
from veneer import PeftModel
from veneer.errors import VeneerWarning
from veneer.files.layout import SAFETENSORS_NAME

DATA = Path(__file__).parent / "data"


@pytest.fixture(params=sorted(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_case_has_its_files_and_no_file_is_without_a_case() -> None:
    assert {p.name for p in DATA.iterdir()} == set(CASES)
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 300_000


@torch.no_grad()
def test_outputs_are_those_of_the_reference(name: str, golden: dict[str, Tensor], base: nn.Module) -> None:
    inputs = golden["input"]
    assert_close(output(base, inputs), golden["output.base"])
    model = PeftModel.from_pretrained(base, str(DATA / name)).eval()
    assert_close(output(model, inputs), golden["output.adapter"])
    assert (golden["output.adapter"] - golden["output.base"]).abs().max() > 0.1


@torch.no_grad()
def test_disabled_is_the_base_except_for_biases_that_were_trained(
    name: str, golden: dict[str, Tensor], base: nn.Module
) -> None:
    alone = output(base, golden["input"])
    model = PeftModel.from_pretrained(base, str(DATA / name)).eval()
    trained = CASES[name].config.get("bias", "none") != "none"
    with (
        pytest.warns(VeneerWarning, match="trains biases") if trained else nullcontext(),
        model.disable_adapter(),
    ):
        disabled = output(model, golden["input"])
    assert torch.equal(disabled, alone) is not trained


@torch.no_grad()
def test_the_merged_model_says_the_same(name: str, golden: dict[str, Tensor], base: nn.Module) -> None:
    merged = PeftModel.from_pretrained(base, str(DATA / name)).merge_and_unload().eval()
    assert type(merged) is type(base)
    assert_close(output(merged, golden["input"]), golden["output.adapter"])


@torch.no_grad()
def test_saving_again_gives_the_same_tensors(name: str, base: nn.Module, tmp_path: Path) -> None:
    PeftModel.from_pretrained(base, str(DATA / name)).save_pretrained(tmp_path)
    ours, theirs = (load_file(place / SAFETENSORS_NAME) for place in (tmp_path, DATA / name))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype is tensor.dtype and torch.equal(ours[key], tensor), key
    config, reference = read_config(tmp_path), read_config(DATA / name)
    for key in (
        "target_modules",
        "modules_to_save",
    ):  # the reference writes sets in the order of their hashes
        if isinstance(reference[key], list):
            reference[key].sort()
    different = {k for k in config if config[k] != reference.get(k)}
    assert different <= {"peft_version", "auto_mapping"}


def test_loading_changes_nothing_of_the_base(name: str, golden: dict[str, Tensor], base: nn.Module) -> None:
    PeftModel.from_pretrained(copy.deepcopy(base), str(DATA / name))
    model = PeftModel.from_pretrained(base, str(DATA / name)).unload()
    weights = model.state_dict()
    saved = {k.removeprefix("base.") for k in golden if k.startswith("base.")}
    assert weights.keys() == saved
    for key, tensor in weights.items():
        assert torch.equal(tensor, golden[f"base.{key}"]), key
