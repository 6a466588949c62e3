"""Trained tokens and tied weights: the same files and outputs as the reference, in both directions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

import veneer
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
from tests.interop.reference_models import ids, llama_config, t5_config, two_texts
from tests.tolerances import BY_DTYPE, assert_close

FLOAT32 = BY_DTYPE[torch.float32]
TOKENS = [3, 7, 11, 0]


def llama(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(tie_word_embeddings=tied)).eval()


CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "list": (False, {"trainable_token_indices": TOKENS}),
    "list-tied": (True, {"trainable_token_indices": TOKENS}),
    "dict": (False, {"trainable_token_indices": {"embed_tokens": TOKENS}}),
    "dict-tied": (True, {"trainable_token_indices": {"embed_tokens": [5]}}),
    "both-tied": (True, {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}}),
    "both-apart": (False, {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [7]}}),
    "tied-by-name": (True, {"trainable_token_indices": [5], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_trained_tokens(case: str, tmp_path: Path) -> None:
    tied, given = CASES[case]
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **given}
    base, inputs = llama(tied), {"input_ids": ids()}
    inputs["input_ids"][0, :5] = torch.tensor([5, 6, 7, 11, 3])
    with quiet():
        ours, theirs = both(lambda: base, options)
    randomise(ours)
    randomise(theirs)
    expect_same_model(ours, theirs)
    expected = output(ours, inputs)
    assert_close(expected, output(theirs, inputs), FLOAT32)
    grads = []
    for model in (ours, theirs):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name], FLOAT32)
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        expect_same_tensors(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
        reread = from_reference(base, tmp_path / "ours")
    assert_close(output(reread, inputs), expected, FLOAT32)
    again = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    assert torch.equal(output(again.eval(), inputs), expected)
    merged = again.merge_and_unload()
    assert_close(output(merged, inputs), expected, FLOAT32)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    merged.save_pretrained(tmp_path / "merged")
    assert_close(output(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), inputs), expected, FLOAT32)


def test_tokens_of_an_embedding_that_encoder_and_decoder_share() -> None:
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(t5_config()).eval()
    tokens = {"trainable_token_indices": {"shared": [3, 7, 11]}}
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q"], **tokens}
    with quiet():
        ours, theirs = both(lambda: base, options)
    randomise(ours)
    randomise(theirs)
    inputs = two_texts()
    inputs["input_ids"][:, :3] = torch.tensor([3, 7, 11])
    inputs["decoder_input_ids"][:, 1] = 7
    expected = output(ours, inputs)
    assert_close(expected, output(theirs, inputs), FLOAT32)
    assert not torch.allclose(expected, output(base, inputs))
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    ours.merge_adapter()
    assert_close(output(ours, inputs), expected, FLOAT32)
    ours.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
