"""The files of a base model: one or several, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from veneer.base_files import BaseFiles
from veneer.errors import CheckpointError


def split(place: Path) -> Path:
    """Two files and their index."""
    index = {}
    for number in range(2):
        file, name = f"model-{number}.safetensors", f"model.{number}.weight"
        save_file({name: torch.full((2, 3), float(number))}, place / file)
        index[name] = file
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return place


def test_tensors_of_one_file_and_of_several(tmp_path: Path) -> None:
    files = BaseFiles(split(tmp_path))
    assert list(files) == ["model.0.weight", "model.1.weight"] and len(files) == 2
    assert [file.name for file in files.headers] == ["model-0.safetensors", "model-1.safetensors"]
    assert files.entry("model.1.weight") == ("F32", (2, 3))
    assert torch.equal(files.read("model.1.weight"), torch.ones(2, 3))
    assert list(BaseFiles(tmp_path / "model-1.safetensors")) == ["model.1.weight"]


def test_names_with_and_without_a_prefix(tmp_path: Path) -> None:
    files = BaseFiles(split(tmp_path), prefix="model")
    for name in ("model.0.weight", "outer.model.0.weight", "0.weight"):
        assert files.stored_name(name) == "model.0.weight"
    assert files.stored_name("2.weight") is None
    assert BaseFiles(tmp_path).stored_name("0.weight") is None


def test_codes_are_told_by_their_type_and_by_what_lies_beside_them(tmp_path: Path) -> None:
    save_file(
        {
            "plain.weight": torch.ones(2),
            "float8.weight": torch.ones(2).to(torch.float8_e4m3fn),
            "scaled.weight": torch.ones(2, dtype=torch.uint8),
            "scaled.weight_scale_inv": torch.ones(1),
        },
        tmp_path / "model.safetensors",
    )
    files = BaseFiles(tmp_path)
    assert files.codes("plain.weight") is None
    assert "8-bit floats" in str(files.codes("float8.weight"))
    assert "weight_scale_inv" in str(files.codes("scaled.weight"))


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        BaseFiles(tmp_path)
    (split(tmp_path) / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-1\.safetensors, which its index names"):
        BaseFiles(tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors cannot be read"):
        BaseFiles(tmp_path)
    for text in ("{}", "[]", "no", '{"weight_map": {"a": ["b"]}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            BaseFiles(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    with pytest.raises(CheckpointError, match="lacks"):
        BaseFiles(tmp_path)
