"""Replicated layers, tied heads and resized vocabularies: with the reference, and saved and read again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import veneer
from tests.interop.reference import (
    both,
    expect_same_model,
    expect_same_tensors,
    from_reference,
    output,
    peft,
    quiet,
    randomise,
    stored,
)
from tests.interop.reference_models import bert_config, ids, llama_config
from tests.tolerances import BY_DTYPE, assert_close
from veneer import LoraConfig, PeftModel
from veneer.errors import ConfigError, LoadMismatchError, MergeError, TargetError, VeneerError

FLOAT32 = BY_DTYPE[torch.float32]


def llama(tied: bool = False, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(tie_word_embeddings=tied, **more)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(**bert_config().to_diff_dict())).eval()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_replicated_layers(kind: str, tmp_path: Path) -> None:
    base = llama(num_hidden_layers=3) if kind == "llama" else bert()
    target, ranges = ("q_proj", [[0, 2], [1, 3]]) if kind == "llama" else ("query", [[0, 2], [0, 1]])
    options = {"r": 4, "lora_alpha": 6, "target_modules": [target], "layer_replication": ranges}
    with quiet():
        ours, theirs = both(lambda: base, options)
    randomise(ours)
    randomise(theirs)
    expect_same_model(ours, theirs)
    inputs = {"input_ids": ids()}
    expected = output(ours, inputs)
    assert_close(expected, output(theirs, inputs), FLOAT32)
    assert ours.config.num_hidden_layers == theirs.config.num_hidden_layers
    before = sum(p.numel() for p in base.parameters())
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters()) == before + trained
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    expect_same_tensors(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    with quiet():
        assert_close(output(from_reference(base, tmp_path / "ours"), inputs), expected, FLOAT32)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True).eval()
    assert torch.equal(output(again, inputs), expected)
    again.load_adapter(tmp_path / "theirs", "second", is_trainable=True)
    again.set_adapter("second")
    assert torch.equal(output(again.eval(), inputs), expected)
    again.set_adapter("default")
    again.delete_adapter("second")
    with pytest.raises(MergeError, match="also the weight of"):
        again.merge_adapter()
    assert_close(output(again.merge_and_unload(untie=True), inputs), expected, FLOAT32)
    plain = ours.unload()
    assert torch.equal(output(plain, inputs), output(base, inputs))
    assert plain.config.num_hidden_layers == base.config.num_hidden_layers


@pytest.mark.parametrize("ranges", [[[0, 9]], [[1, 1]], [[0]], [[0, "2"]]])
def test_ranges_that_are_none_change_nothing(ranges: list[Any]) -> None:
    base = llama()
    with pytest.raises(ConfigError, match="layer_replication"):
        veneer.get_peft_model(base, LoraConfig(target_modules=["q_proj"], layer_replication=ranges))
    assert len(base.model.layers) == base.config.num_hidden_layers == 2
    with pytest.raises(TargetError):
        veneer.get_peft_model(
            base, LoraConfig(target_modules=["nowhere"], layer_replication=[[0, 2], [0, 2]])
        )
    assert len(base.model.layers) == base.config.num_hidden_layers == 2


TIED: dict[str, dict[str, Any]] = {
    "LoRA on the head": {"target_modules": ["lm_head"]},
    "LoRA on the embedding": {"target_modules": ["embed_tokens"]},
    "the head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "tokens and the head whole": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5], "lm_head": [6]},
    },
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_merges_saves_and_reads_back_as_it_was(case: str, tmp_path: Path) -> None:
    base, inputs = llama(tied=True), {"input_ids": ids()}
    inputs["input_ids"][0, :2] = torch.tensor([5, 6])
    model = veneer.get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, **TIED[case])).eval()
    randomise(model)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter", is_trainable=True).eval()
    assert torch.equal(output(again, inputs), expected)
    merged = again.merge_and_unload(untie=True)
    assert_close(output(merged, inputs), expected, FLOAT32)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(output(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), inputs), expected, FLOAT32)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(base, inputs))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_resized_vocabulary(when: str, tmp_path: Path) -> None:
    base, inputs = llama(tied=True), {"input_ids": ids()}
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    resized = copy.deepcopy(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=None)
    if when == "before":
        resized.resize_token_embeddings(27, mean_resizing=False)
        model = veneer.get_peft_model(resized, config)
    else:
        model = veneer.get_peft_model(resized, config)
        model.get_base_model().resize_token_embeddings(27, mean_resizing=False)
    randomise(model)
    inputs["input_ids"][0, 0] = 25
    expected = output(model.eval(), inputs)
    model.save_pretrained(tmp_path / "adapter")
    assert any(name.endswith("embed_tokens.weight") for name in stored(tmp_path / "adapter"))
    with pytest.raises(LoadMismatchError, match="resize_token_embeddings\\(27\\)"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    other = copy.deepcopy(base)
    other.resize_token_embeddings(27, mean_resizing=False)
    with pytest.warns(veneer.VeneerWarning, match="replaced"):
        again = PeftModel.from_pretrained(other, tmp_path / "adapter", is_trainable=True).eval()
    assert torch.equal(output(again, inputs), expected)


def test_a_token_beyond_the_vocabulary_names_the_way_out() -> None:
    base = llama()
    with pytest.raises(VeneerError, match="resize_token_embeddings"):
        veneer.get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[23]))
    assert type(base.model.embed_tokens) is nn.Embedding


BART_SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
SCALED = {"scale_embedding": True}
WITH_TYING: dict[str, dict[str, Any]] = {
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "lora_dropout": 0.1},
    "an expression": {"target_modules": r".*embed_tokens"},
    "rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
    "the embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "the head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("case", WITH_TYING)
def test_adapters_that_stay_tied(case: str, tmp_path: Path) -> None:
    base, inputs = llama(tied=True), {"input_ids": ids()}
    options = {"r": 4, "lora_alpha": 6, "ensure_weight_tying": True, **WITH_TYING[case]}
    with quiet():
        ours, theirs = both(lambda: base, options)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    randomise(theirs)
    expected = output(theirs, inputs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True).eval()
    assert_close(output(loaded, inputs), expected, FLOAT32)
    assert (output(loaded, inputs) - output(base, inputs)).abs().max() > 0.1
    loaded.save_pretrained(tmp_path / "ours")
    saved = stored(tmp_path / "ours")
    carried = {k for k in saved if k.endswith("base_layer.weight")}
    wanted = stored(tmp_path / "theirs")
    expect_same_tensors(
        {k: v for k, v in saved.items() if k not in carried},
        {k: v for k, v in wanted.items() if k not in carried},
    )
    again = from_reference(base, tmp_path / "ours")
    assert torch.equal(output(again, inputs), expected)

    own = output(loaded, inputs)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True).eval()
    assert torch.equal(output(reloaded, inputs), own)
    if "modules_to_save" not in options:
        report = loaded.merge_adapter()
        assert not any("lm_head" in path for path in report.kept)
        assert_close(output(loaded, inputs), own, FLOAT32)
        with loaded.disable_adapter():
            assert torch.equal(output(loaded, inputs), output(base, inputs))
        loaded.unmerge_adapter()
        assert torch.equal(output(loaded, inputs), own)
    merged = loaded.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    assert_close(output(merged, inputs), own, FLOAT32)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(output(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), inputs), own, FLOAT32)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("targets", [["shared"], ["embed_tokens"], r".*lm_head"], ids=str)
def test_encoder_decoder_embeddings_that_stay_tied(kind: str, targets: Any, tmp_path: Path) -> None:
    """There each of them has factors of its own, which are not tied; ours are, and it reads them."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        if kind == "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
            return T5ForConditionalGeneration(T5Config(vocab_size=23, **sizes)).eval()
        sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART_SIZES.items()}
        return BartForConditionalGeneration(BartConfig(vocab_size=23, d_model=16, **sizes, **SCALED)).eval()

    inputs = {"input_ids": ids(), "decoder_input_ids": ids()}
    options = {"r": 4, "lora_alpha": 6, "target_modules": targets, "ensure_weight_tying": True}
    model = veneer.get_peft_model(build(), LoraConfig(**options)).eval()
    randomise(model)
    expected = output(model, inputs)
    assert not torch.allclose(expected, output(build(), inputs))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(build(), tmp_path).eval(), inputs), expected)
    assert_close(output(from_reference(build(), tmp_path), inputs), expected, FLOAT32)


def test_a_file_whose_pair_was_parted_is_not_tied_silently(tmp_path: Path) -> None:
    base = llama(tied=True).to(torch.bfloat16)
    options = {"r": 4, "target_modules": ["lm_head"], "ensure_weight_tying": True}
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
        randomise(theirs).save_pretrained(tmp_path)
    names = list(base.state_dict())
    with pytest.raises(LoadMismatchError, match="Load it untied"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == names
