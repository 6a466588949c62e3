"""Trained tokens and tied weights: the same files and outputs as the reference, in both directions."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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
from veneer.errors import VeneerWarning

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


class Tables(nn.Module):
    """Two embeddings, the path of one of which ends in that of the other's name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.ModuleDict({"embed": nn.Embedding(9, 4), "word_embed": nn.Embedding(9, 4)})
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.text["embed"](x) + self.text["word_embed"](x))


def given(keys: dict[str, list[int]]) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 3, "target_modules": ["fc"], "trainable_token_indices": keys}


def rows(model: nn.Module) -> set[str]:
    """The modules whose rows the adapter trains."""
    end = ".token_adapter.trainable_tokens_delta.default"
    names = [name.removesuffix(end) for name, _ in model.named_parameters() if name.endswith(end)]
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize(
    "keys",
    [{"embed": [1, 2]}, {"word_embed": [3]}, {"text.embed": [4]}, {"embed": [1, 2], "word_embed": [3, 4, 5]}],
    ids=str,
)
def test_a_key_takes_every_module_whose_path_ends_in_it(keys: dict[str, list[int]], tmp_path: Path) -> None:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)
        ours, theirs = both(Tables, given(keys))
    randomise(ours)
    randomise(theirs)
    assert rows(ours) == rows(theirs)
    expect_same_model(ours, theirs)
    ours.save_pretrained(tmp_path)
    reread = from_reference(Tables(), tmp_path)
    x = torch.arange(9)
    assert_close(reread(x), ours(x), FLOAT32)


def test_a_key_that_takes_more_than_a_whole_name_is_mentioned() -> None:
    with pytest.warns(VeneerWarning) as caught:
        veneer.get_peft_model(Tables(), veneer.LoraConfig(**given({"embed": [1]})))
    assert [str(w.message) for w in caught] == [
        "trainable_token_indices 'embed' takes every module whose path ends in it, as in PEFT: "
        "text.word_embed too. For text.embed alone give the whole path"
    ]


def test_of_two_keys_that_take_a_module_the_first_counts() -> None:
    keys = {"text.word_embed": [1], "embed": [1], "word_embed": [2]}
    with pytest.warns(VeneerWarning) as caught:
        ours = veneer.get_peft_model(Tables(), veneer.LoraConfig(**given(keys)))
    assert [str(w.message) for w in caught][1:] == [
        "trainable_token_indices 'word_embed': text.word_embed trains the tokens of 'text.word_embed', the "
        "first key that takes it, as in PEFT"
    ]
    assert ours.base_model.model.text["word_embed"].token_indices == {"default": [1]}


def test_what_a_key_takes_is_named_where_it_has_no_rows() -> None:
    net = Tables()
    net.text["word_embed"] = nn.Conv1d(4, 4, 1)
    with pytest.raises(veneer.TargetError, match=r"text\.word_embed \(Conv1d\)[\s\S]*give the whole path"):
        veneer.get_peft_model(net, veneer.LoraConfig(**given({"embed": [1]})))


def test_expressions_are_written_as_paths(tmp_path: Path) -> None:
    ours = veneer.get_peft_model(Tables(), veneer.LoraConfig(**given({r".*\.word_\w+": [1, 5]})))
    assert rows(ours) == {"text.word_embed"}
    randomise(ours)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["trainable_token_indices"] == {"text.word_embed": [1, 5]}
    expect_same_model(ours, from_reference(Tables(), tmp_path))


def test_files_of_earlier_versions_load_as_they_were_meant(tmp_path: Path) -> None:
    """Which took a key for a whole name."""
    first = veneer.get_peft_model(Tables(), veneer.LoraConfig(**given({"text.embed": [1, 5]})))
    randomise(first)
    first.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "adapter_config.json"
    config = {**json.loads(file.read_text()), "trainable_token_indices": {"embed": [1, 5]}}
    file.write_text(json.dumps(config))
    save_file(stored(tmp_path / "old"), tmp_path / "old" / "adapter_model.safetensors")
    ours = veneer.PeftModel.from_pretrained(Tables(), tmp_path / "old")
    assert rows(ours) == {"text.embed"}
    expect_same_model(ours, first)
    ours.save_pretrained(tmp_path / "new")
    expect_same_model(ours, from_reference(Tables(), tmp_path / "new"))
