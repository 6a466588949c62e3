"""Models wrapped in models: the text tower of a vision-language model, against the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.interop.reference import (
    both,
    expect_same_model,
    expect_same_tensors,
    from_reference,
    output,
    quiet,
    randomise,
    stored,
)
from tests.tolerances import BY_DTYPE, assert_close
from veneer import PeftModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llava() -> nn.Module:
    torch.manual_seed(0)
    text = LlamaConfig(**SIZES, vocab_size=31, intermediate_size=24, num_key_value_heads=2, pad_token_id=0)
    vision = CLIPVisionConfig(**SIZES, intermediate_size=16, image_size=8, patch_size=4, projection_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=30)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*language_model.*\.q_proj"},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
    ],
)
def test_a_vision_language_model(options: dict[str, Any], tmp_path: Path) -> None:
    base = llava()
    with quiet():
        ours, theirs = both(lambda: base, {"r": 4, "lora_alpha": 6, **options})
    randomise(ours)
    randomise(theirs)
    expect_same_model(ours, theirs)
    inputs = {"input_ids": torch.tensor([[3, 5, 9, 11, 3], [4, 8, 5, 12, 7]])}
    expected = output(ours, inputs)
    assert_close(expected, output(theirs, inputs), BY_DTYPE[torch.float32])
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        reread = from_reference(base, tmp_path / "ours")
    expect_same_tensors(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    assert_close(output(reread, inputs), expected, BY_DTYPE[torch.float32])
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True).eval()
    assert torch.equal(output(again, inputs), expected)
    assert_close(output(again.merge_and_unload(), inputs), expected, BY_DTYPE[torch.float32])
