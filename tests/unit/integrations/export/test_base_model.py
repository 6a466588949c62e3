"""Weights of a base by the paths of modules, from a model and from files in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.unit.training.tiny import saved_tiny, tiny_model
from veneer.errors import ExportError
from veneer.integrations.export.base_model import BaseModel


def test_a_model() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    base = BaseModel(model)
    assert torch.equal(base.tensor("0"), model[0].weight)  # type: ignore[arg-type]
    assert torch.equal(base.tensor("0", "bias"), model[0].bias)  # type: ignore[arg-type]
    assert base.tensor("1", "bias") is None and base.tensor("2") is None
    assert base.paths() == ["0", "1"]


def test_files_of_transformers(tmp_path: Path) -> None:
    base, model = BaseModel(saved_tiny(tmp_path)), tiny_model()
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(base.tensor(name), model.get_submodule(name).weight)  # type: ignore[arg-type]
    # Some are saved without their outer prefix.
    assert torch.equal(base.tensor(f"outer.{name}"), model.get_submodule(name).weight)  # type: ignore[arg-type]
    assert name in base.paths()


def test_split_files_of_diffusers(tmp_path: Path) -> None:
    index = {}
    for number in range(2):
        file = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        save_file({f"block.{number}.weight": torch.full((2, 2), float(number))}, tmp_path / file)
        index[f"block.{number}.weight"] = file
    place = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    place.write_text(json.dumps({"weight_map": index}))
    base = BaseModel(tmp_path)
    assert torch.equal(base.tensor("block.1"), torch.ones(2, 2))  # type: ignore[arg-type]
    place.write_text(json.dumps({"weight_map": ["no"]}))
    with pytest.raises(ExportError, match="cannot be read"):
        BaseModel(tmp_path)


def test_nothing_there_or_nothing_that_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no weights of a base model: .* holds neither"):
        BaseModel(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="cannot be read"):
        BaseModel(tmp_path)
