"""Which configuration belongs to the tensors of a directory."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.configurations import read_config
from veneer import LoraConfig, PeftConfig, VeneerWarning
from veneer.errors import AdapterFileError
from veneer.files import layout
from veneer.files.header import read_metadata
from veneer.files.layout import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from veneer.files.read import open_adapter
from veneer.files.write import write_adapter
from veneer.listing import find_adapters

OLD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["m"]}
NEW = {**OLD, "lora_alpha": 64}
TENSORS = {"m.lora_A.weight": torch.ones(2, 4), "m.lora_B.weight": torch.ones(4, 2)}
#: Of Veneer 0.1, which moved the tensors out of a file beside this one, and then this one.
LEFT_BY_0_1 = ".veneer-0123456789abcdef-{}-config.tmp"


def put(place: Path, config: dict[str, Any], name: str = CONFIG_NAME) -> None:
    (place / name).write_text(json.dumps(config))


@pytest.fixture(params=[True, False], ids=["safetensors", "bin"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter that was written over another one."""
    for config in (OLD, NEW):
        write_adapter(tmp_path, TENSORS, config, safe_serialization=request.param)
    return tmp_path


def config_of(place: Path) -> LoraConfig:
    found: LoraConfig = LoraConfig.from_belonging(open_adapter(place).belonging_config())
    return found


def test_an_edited_configuration_is_used_and_its_differences_are_said(saved: Path) -> None:
    put(saved, {**NEW, "lora_alpha": 5, "use_rslora": True, "base_model_name_or_path": "other"})
    with pytest.warns(
        VeneerWarning,
        match=rf"{CONFIG_NAME} was edited after it was saved.*lora_alpha: 64 -> 5; use_rslora: None -> True$",
    ):
        assert read_config(saved)["lora_alpha"] == 5


@pytest.mark.filterwarnings("ignore:.*is a pickle")
@pytest.mark.parametrize(
    "edit",
    [
        {"base_model_name_or_path": "other", "inference_mode": False, "revision": "x"},
        {"bias": "none", "use_dora": False, "rank_pattern": {}, "layers_to_transform": None},
        {"lora_dropout": 0.5, "peft_version": "0.21.2", "lora_alpha": 64.0},
    ],
)
def test_edits_without_effect_are_not_worth_a_word(saved: Path, edit: dict[str, Any]) -> None:
    put(saved, {**NEW, **edit})
    assert read_config(saved) == {**NEW, **edit}
    assert config_of(saved) == PeftConfig.from_dict({**NEW, **edit})


def test_the_order_of_patterns_is_an_effect(tmp_path: Path) -> None:
    config = {**OLD, "rank_pattern": {"a": 1, "b": 2}}
    write_adapter(tmp_path, TENSORS, config)
    put(tmp_path, {**config, "rank_pattern": {"b": 2, "a": 1}})
    with pytest.warns(VeneerWarning, match="rank_pattern"):
        read_config(tmp_path)
    put(tmp_path, {**config, "target_modules": ["m"][::-1]})
    read_config(tmp_path)


def test_a_configuration_that_was_lost_is_that_of_the_tensors(saved: Path) -> None:
    (saved / CONFIG_NAME).unlink()
    with pytest.warns(VeneerWarning, match=f"{CONFIG_NAME} is missing"):
        assert read_config(saved) == NEW


def test_the_one_that_was_to_be_replaced_is_not_used(saved: Path) -> None:
    (saved / CONFIG_NAME).write_text(json.dumps(dict(sorted(OLD.items())), indent=2) + "\n")
    with pytest.warns(VeneerWarning, match=f"cut short.*{CONFIG_NAME} is the one before"):
        assert read_config(saved) == NEW
    (entry,) = find_adapters(saved)
    assert "cut short" in entry.problems[0]


def test_the_metadata_of_both_formats(saved: Path, tmp_path: Path) -> None:
    (file,) = (saved / name for name in (SAFETENSORS_NAME, BIN_NAME) if (saved / name).exists())
    metadata = read_metadata(file)
    assert json.loads(metadata["veneer_config"]) == NEW and len(metadata["veneer_replaces"]) == 64
    if file.name == BIN_NAME:  # which others read as ever
        read = torch.load(file, weights_only=True)
        assert read.keys() == TENSORS.keys() and torch.equal(read["m.lora_A.weight"], torch.ones(2, 4))


def test_saving_the_same_once_more_changes_no_byte(tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    write_adapter(tmp_path, TENSORS, NEW)
    before = contents()
    write_adapter(tmp_path, TENSORS, NEW)
    assert contents() == before


# -- files of Veneer 0.1 and of other libraries ---


def without_record(place: Path, config: dict[str, Any], bin: bool = False) -> None:
    if bin:
        torch.save(TENSORS, place / BIN_NAME)
    else:
        save_file(TENSORS, place / SAFETENSORS_NAME)
    put(place, config)


@pytest.mark.filterwarnings("ignore:.*is a pickle")
@pytest.mark.parametrize("bin", [False, True])
def test_a_save_by_0_1_that_was_killed_is_read_as_it_did(tmp_path: Path, bin: bool) -> None:
    without_record(tmp_path, OLD, bin)
    if bin:
        save_file({"older": torch.zeros(1)}, tmp_path / SAFETENSORS_NAME)
    left = LEFT_BY_0_1.format("bin" if bin else "safetensors")
    put(tmp_path, NEW, left)
    with pytest.warns(VeneerWarning, match=rf"cut short; its configuration is read from {left}"):
        assert read_config(tmp_path) == NEW
    assert open_adapter(tmp_path).shapes.keys() == TENSORS.keys()
    write_adapter(tmp_path, TENSORS, NEW)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, SAFETENSORS_NAME]


def test_a_save_by_0_1_that_never_happened_counts_for_nothing(tmp_path: Path) -> None:
    without_record(tmp_path, OLD)
    left = LEFT_BY_0_1.format("safetensors")
    put(tmp_path, NEW, left)
    (tmp_path / left.replace("config", "tensors")).touch()
    assert read_config(tmp_path) == OLD


def test_a_save_that_fails_finishes_one_of_0_1_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_record(tmp_path, OLD)
    put(tmp_path, NEW, LEFT_BY_0_1.format("safetensors"))
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ValueError, match="nothing has changed"):
        write_adapter(tmp_path, TENSORS, OLD)
    assert read_config(tmp_path) == NEW


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_hidden_file_never_overrides_what_veneer_writes_now(saved: Path, format: str) -> None:
    put(saved, {**NEW, "lora_alpha": 3000}, LEFT_BY_0_1.format(format))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is a pickle")
        assert read_config(saved) == NEW and PeftConfig.from_belonging(
            open_adapter(saved).belonging_config()
        ) == PeftConfig.from_dict(NEW)
    write_adapter(saved, TENSORS, NEW)
    assert not [name for name in os.listdir(saved) if name.startswith(".")]


def test_tensors_that_cannot_be_read_leave_the_configuration_that_is_there(tmp_path: Path) -> None:
    put(tmp_path, OLD)
    (tmp_path / SAFETENSORS_NAME).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert PeftConfig.from_pretrained(tmp_path).lora_alpha == 4


# -- readers beside writers ---


def test_tensors_that_are_replaced_while_they_are_read_are_read_again(tmp_path: Path) -> None:
    write_adapter(tmp_path, TENSORS, OLD)
    seen = []

    def read(path: Path) -> dict[str, str]:
        if not seen:
            write_adapter(tmp_path, TENSORS, NEW)
        seen.append(read_metadata(path))
        return seen[-1]

    metadata, beside = layout.together(tmp_path, read)
    assert len(seen) == 2
    assert layout.belonging_config(tmp_path, metadata, beside) == (tmp_path / CONFIG_NAME, NEW, None, None)


def test_what_is_replaced_again_and_again_is_given_up(tmp_path: Path) -> None:
    write_adapter(tmp_path, TENSORS, OLD)
    tensors = (tmp_path / SAFETENSORS_NAME).read_bytes()

    def read(path: Path) -> None:
        (tmp_path / "new").write_bytes(tensors)
        os.replace(tmp_path / "new", path)

    with pytest.raises(AdapterFileError, match="replaced again and again"):
        layout.together(tmp_path, read)


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with (
        pytest.raises(AdapterFileError, match=r"cannot read .*loop: .*symbolic links"),
        layout.watched(tmp_path / "loop"),
    ):
        pass


def test_a_record_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    write_adapter(tmp_path, TENSORS, OLD)
    tensors = load_file(tmp_path / SAFETENSORS_NAME)
    for text in ("{", "[]", '{"r": 1, "r": 2}', "\ud800"):
        metadata = {"veneer_config": text.encode("utf-8", "replace").decode()}
        save_file(tensors, tmp_path / SAFETENSORS_NAME, metadata=metadata)
        with pytest.raises(AdapterFileError, match="the configuration in the metadata of the tensors"):
            read_config(tmp_path)
