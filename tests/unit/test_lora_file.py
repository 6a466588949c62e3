"""A LoRA on disk: its two files are held against one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from veneer.errors import AdapterFileError
from veneer.files.layout import CONFIG_NAME
from veneer.files.write import write_adapter
from veneer.lora_file import open_lora

PATH = "base_model.model.body.0"
FACTORS = {f"{PATH}.lora_A.weight": torch.ones(2, 4), f"{PATH}.lora_B.weight": torch.ones(3, 2)}


def written(place: Path, tensors: dict[str, torch.Tensor], **options: object) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["0"]}
    write_adapter(place, tensors, {**config, **options})
    return place


def test_what_each_module_got(tmp_path: Path) -> None:
    config, file, specs, _ = open_lora(written(tmp_path, FACTORS))
    assert (config.r, file.shapes.keys(), list(specs)) == (2, FACTORS.keys(), ["body.0"])


@pytest.mark.parametrize(
    ("tensors", "options", "says"),
    [
        ({"other.weight": torch.ones(1)}, {}, r"no factors of a LoRA, only: other\.weight"),
        ({f"{PATH}.lora_A.weight": torch.ones(2, 4)}, {}, "only one of the two factors of body.0"),
        (FACTORS, {"r": 5}, "body.0: the configuration gives it rank 5, its factors have rank 2"),
        (
            {**FACTORS, f"{PATH}.lora_B.weight": torch.ones(3, 7)},
            {},
            r"body.0: factors of shapes \(2, 4\) and \(3, 7\) have no product",
        ),
        (FACTORS, {"peft_type": "IA3"}, f"{CONFIG_NAME} of .* cannot be used: .*IA3"),
        (FACTORS, {"peft_type": None}, f"{CONFIG_NAME} of .* cannot be used: .*peft_type"),
    ],
)
def test_what_is_no_lora_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], options: dict[str, object], says: str
) -> None:
    with pytest.raises(AdapterFileError, match=says):
        open_lora(written(tmp_path, tensors, **options))


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    written(tmp_path, FACTORS)
    (tmp_path / CONFIG_NAME).write_text(json.dumps([1]))
    with pytest.raises(AdapterFileError, match="holds a JSON list"):
        open_lora(tmp_path)
