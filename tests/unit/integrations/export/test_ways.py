"""Every way out that a refusal names is one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.integrations.export.adapters import CASES, Saved, save
from veneer import PeftModel, export_adapter
from veneer.errors import ExportError, MergeError
from veneer.integrations.export import targets
from veneer.integrations.export.ways import MERGE_UNTIED

REFUSED = [name for name, case in CASES.items() if set(case.targets.split()) < set(targets.names())]
#: What merging refuses too.
NO_WAY = ("alora", "lora_bias")


def refusal(adapter: Saved, out: Path, target: str, **options: Any) -> str:
    with pytest.raises(ExportError) as refused:
        export_adapter(adapter.place, out, target, **options)
    return str(refused.value)


def merged(adapter: Saved, place: Path, untie: bool) -> Any:
    model = PeftModel.from_pretrained(copy.deepcopy(adapter.model), adapter.place, check_base=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload(untie=untie)
        if hasattr(plain, "save_pretrained"):
            plain.save_pretrained(place)
    return plain


@pytest.mark.parametrize("name", REFUSED)
def test_merging_is_named_where_it_is_a_way_and_with_the_flag_that_it_takes(
    name: str, tmp_path: Path
) -> None:
    adapter = save(name, tmp_path)
    target = next(target for target in targets.names() if target not in CASES[name].targets.split())
    options = {"component": "unet"} if target == "diffusers" else {}
    said = refusal(adapter, tmp_path / "out", target, base=adapter.base or adapter.model, **options)
    assert ("veneer merge" in said) == (name not in NO_WAY)
    assert ("only PEFT and Veneer can use it" in said) == (name == "alora")
    if "veneer merge" not in said:
        with pytest.raises(MergeError):
            merged(adapter, tmp_path / "merged", True)
        return
    untie = MERGE_UNTIED in said
    merged(adapter, tmp_path / "merged", untie)
    if untie:
        with pytest.raises(MergeError, match="untie=True"):
            merged(adapter, tmp_path / "again", False)


def test_a_bias_of_b_is_merged_into_a_bias_that_there_is(tmp_path: Path) -> None:
    adapter = save("lora_bias", tmp_path)  # of its layers, down has no bias
    assert "if every layer with a bias of B has one of its own" in refusal(adapter, tmp_path / "out", "vllm")
    assert "veneer merge" not in refusal(adapter, tmp_path / "out", "vllm", base=adapter.model)


def test_a_base_that_is_not_at_hand_may_need_to_be_untied(tmp_path: Path) -> None:
    adapter = save("embedding", tmp_path)
    said = refusal(adapter, tmp_path / "out", "ollama")
    assert "veneer merge" in said and "`veneer merge --untie` if the base ties embedding and head" in said
    assert torch.is_tensor(merged(adapter, tmp_path / "merged", False).table.weight)
