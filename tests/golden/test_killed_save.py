"""A save that is killed between its two renames, read by PeftModel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from veneer import LoraConfig, PeftModel, VeneerWarning, get_peft_model
from veneer.files.layout import CONFIG_NAME


class Killed(BaseException):
    """Stands for a process that is no more."""


def test_a_killed_save_never_mixes_two_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(alpha: int) -> PeftModel:
        return get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(4, 4)),
            LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]),
        )

    model(4).save_pretrained(tmp_path)
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if Path(target).name == CONFIG_NAME:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        model(64).save_pretrained(tmp_path)
    monkeypatch.undo()
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.warns(VeneerWarning, match="cut short"):
        loaded = PeftModel.from_pretrained(base, tmp_path, check_base=False)
    assert loaded.peft_config["default"].lora_alpha == 64
