"""Verifying: a whole adapter passes, and each kind of damage fails its own check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.unit.training.test_merge_files import adapter_of, base_of
from tests.unit.training.tiny import saved_tiny
from veneer.tools import Check, verify_adapter
from veneer.training.loading import Loading

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("base"), torch.float32)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


def checks(place: Path, model: Path | None = None, **more: Any) -> dict[str, Check]:
    found = list(verify_adapter(place, None if model is None else str(model), **more))
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.passed is False]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_adapter_passes_all(dtype: str, whole: Path, base: Path) -> None:
    found = checks(whole, base, loading=Loading(dtype))
    assert [c.name for c in found.values() if c.passed] == [
        "files", "digest", "values", "names and shapes", "base", "outputs", "reload", "merge"
    ]  # fmt: skip
    assert "moves them by" in found["outputs"].found and "8 tensors" not in found["files"].found


def test_without_a_base_only_files_are_read(whole: Path) -> None:
    assert list(checks(whole)) == ["files", "digest", "values"]


def test_variants_are_tried_too(base: Path, tmp_path: Path) -> None:
    assert not failed(checks(adapter_of(base, tmp_path / "dora", use_dora=True), base))
    pissa = adapter_of(base, tmp_path / "pissa", init_lora_weights="pissa", target_modules=["q_proj"])
    assert not failed(checks(pissa, base))
    alora = adapter_of(base, tmp_path / "alora", alora_invocation_tokens=[1], target_modules=["q_proj"])
    found = checks(alora, base)
    assert not failed(found) and found["merge"].passed is None and "cannot be merged" in found["merge"].found


def rewrite(place: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change tensors as another program does: without the digest, and with the other metadata."""
    with safe_open(place / TENSORS, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "veneer_digest"}
    save_file(
        {n: t.contiguous() for n, t in change(load_file(place / TENSORS)).items()}, place / TENSORS, metadata
    )


def test_what_was_not_there_is_not_checked(place: Path, base: Path) -> None:
    save_file(load_file(place / TENSORS), place / TENSORS)
    found = checks(place, base)
    assert [name for name, check in found.items() if check.passed is None] == ["digest", "base"]


def test_an_adapter_that_changes_nothing_is_said(place: Path, base: Path) -> None:
    rewrite(place, lambda tensors: {n: t * (".lora_A" in n) for n, t in tensors.items()})
    found = checks(place, base)["outputs"]
    assert found.passed is None and "changes nothing" in found.found


def test_flipped_bits_fail_the_digest(place: Path) -> None:
    with (place / TENSORS).open("rb+") as file:
        file.seek(-3, 2)
        file.write(b"\1")
    found = checks(place)
    assert failed(found) == ["digest"] and list(found) == ["files", "digest"]


def test_values_that_are_not_finite_fail(place: Path, base: Path) -> None:
    rewrite(place, lambda tensors: {n: t * torch.nan for n, t in tensors.items()})
    found = checks(place, base)
    assert failed(found) == ["values"] and "names and shapes" not in found
    assert "check_finite" not in found["values"].found


def test_files_that_do_not_belong_together_fail(place: Path) -> None:
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    found = checks(place)
    assert failed(found) == ["files"] == list(found) and "rank 3" in found["files"].found


def test_an_edited_configuration_is_remarked(place: Path) -> None:
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    found = checks(place)
    assert not failed(found) and "was edited after it was saved" in found["files"].found


def test_a_missing_module_fails_on_the_base(place: Path, base: Path) -> None:
    rewrite(place, lambda tensors: {n: t for n, t in tensors.items() if "layers.0" not in n})
    found = checks(place, base)
    assert failed(found) == ["names and shapes"] and "strict" not in found["names and shapes"].found


def test_another_base_fails(whole: Path, tmp_path: Path) -> None:
    found = checks(whole, saved_tiny(tmp_path, seed=7))
    assert failed(found) == ["base"] and "another base model" in found["base"].found
    assert found["merge"].passed


def test_outputs_that_are_not_finite_fail(place: Path, base: Path) -> None:
    rewrite(place, lambda tensors: {n: t * 1e22 for n, t in tensors.items()})
    assert "outputs" in failed(checks(place, base))


def test_what_merging_and_saving_change_is_seen(
    whole: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer import PeftModel

    def save_less(self: PeftModel, place: str, **options: Any) -> None:
        tensors = load_file(whole / TENSORS)
        name = tensors.popitem()[0]
        shutil.copytree(whole, place, dirs_exist_ok=True)
        save_file(tensors, Path(place) / TENSORS)
        assert name

    monkeypatch.setattr(PeftModel, "save_pretrained", save_less)
    monkeypatch.setattr(
        "veneer.lora_model.LoraModel.merge_adapter", lambda self: self.disable_adapter_layers()
    )
    found = checks(whole, base)
    assert failed(found) == ["reload", "merge"] and "1 tensors are not the same" in found["reload"].found
