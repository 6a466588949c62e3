"""A head over an embedding's factors: one tensor, one gradient, and the whole life of an adapter."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tests.tolerances import BY_DTYPE, assert_close
from veneer import ConfigError, LoraConfig, PeftModel, TargetError, VeneerWarning, get_peft_model
from veneer.layers.tied import LoraTiedEmbedding, LoraTiedHead

FLOAT32 = BY_DTYPE[torch.float32]
IDS = torch.arange(6)[None]


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, tie_word_embeddings=tied, **sizes)).eval()


def config(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": ["lm_head"], "ensure_weight_tying": True, **options}
    )


def adapted(**options: Any) -> PeftModel:
    model = get_peft_model(llama(), config(**options)).eval()
    moved(model)
    return model


def moved(model: PeftModel, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()


def logits(model: nn.Module, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def test_the_gradient_is_that_of_one_weight_with_one_update() -> None:
    model = adapted()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sorted(n.split(".")[-2] for n in trained) == ["lora_embedding_A", "lora_embedding_B"]
    model(input_ids=IDS, labels=IDS).loss.backward()
    a, b = (p.detach().clone().requires_grad_() for p in trained.values())
    plain = llama()
    weight = plain.lm_head.weight.detach() + 3.0 * (b @ a).T
    values = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    torch.func.functional_call(plain, values, kwargs={"input_ids": IDS, "labels": IDS}).loss.backward()
    for mine, other in zip(trained.values(), (a, b), strict=True):
        assert_close(mine.grad, other.grad, FLOAT32)


def test_a_pair_follows_through_its_life() -> None:
    model = adapted()
    base, expected = logits(llama()), logits(model)
    assert isinstance(model.lm_head, LoraTiedHead)
    model.base_model.rename_adapter("default", "first")
    model.base_model.copy_adapter("first", "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    twin = copy.deepcopy(model)
    twin.set_adapter("first")
    moved(twin, seed=2)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)
    head, table = twin.lm_head, twin.model.model.embed_tokens
    assert torch.equal(head.lora_A["first"].weight, table.lora_embedding_B["first"].T)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    assert torch.equal(logits(torch.load(kept, weights_only=False)), expected)
    rows = torch.cat([IDS, IDS])
    mixed = model(input_ids=rows, adapter_names=["__base__", "second"]).logits
    assert_close(mixed[:1], base, FLOAT32)
    assert_close(mixed[1:], expected, FLOAT32)
    model.lm_head.merge()
    assert model.model.model.embed_tokens.merged_adapters == ["second"] == model.lm_head.merged_adapters
    assert_close(logits(model), expected, FLOAT32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)
        model.set_adapter("first")
        assert not model.lm_head.merged
        model.delete_adapter("second")
        model.delete_adapter("first")
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(model.unload()), base)


def test_a_state_dict_brings_the_pair_back() -> None:
    model = adapted()
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = get_peft_model(llama(), config()).eval()
    other.load_state_dict(tensors)
    assert torch.equal(logits(other), logits(model))
    assert "base_model.model.lm_head.lora_A.default.weight" in tensors


def test_copies_keep_one_weight() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    head, table = model.lm_head, model.model.model.embed_tokens
    assert head.modules_to_save["default"].weight is table.modules_to_save["default"].weight
    model.base_model.copy_adapter("default", "second")
    assert head.modules_to_save["second"].weight is table.modules_to_save["second"].weight
    assert head.modules_to_save["second"].weight is not table.modules_to_save["default"].weight
    assert [n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n] == [
        "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "dora changes an embedding and a head differently"),
        ({"init_lora_weights": "pissa"}, "another start"),
        ({"rank_pattern": {"embed_tokens": 4}}, "another rank or strength"),
        ({"modules_to_save": ["embed_tokens"]}, "name them in one of the two"),
    ],
)
def test_what_one_weight_cannot_do_is_refused(options: dict[str, Any], reason: str) -> None:
    base = llama()
    names = list(base.state_dict())
    with pytest.raises(TargetError, match=reason):
        get_peft_model(base, config(**options))
    assert list(base.state_dict()) == names


@pytest.mark.parametrize("tied_first", [True, False])
def test_all_adapters_of_a_pair_are_tied_or_none(tied_first: bool) -> None:
    for named in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = get_peft_model(llama(), config(ensure_weight_tying=tied_first, **named))
        with pytest.raises(TargetError, match="tie"):
            model.add_adapter("second", config(ensure_weight_tying=not tied_first, **named))
        model.add_adapter("third", config(ensure_weight_tying=tied_first, **named))


@pytest.mark.parametrize(
    ("tied", "targets", "said"), [(False, "lm_head", "no module shares"), (True, "q_proj", "names any of")]
)
def test_an_option_that_ties_nothing_says_so(tied: bool, targets: str, said: str) -> None:
    with pytest.warns(VeneerWarning, match=said):
        model = get_peft_model(llama(tied), config(target_modules=[targets]))
    assert not any(isinstance(m, LoraTiedHead) for m in model.modules())


def test_weighted_adapters_stay_tied() -> None:
    model = adapted()
    model.base_model.copy_adapter("default", "second")
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], kind, combination_type=kind)
        expected = logits(model)
        model.set_adapter(kind)
        assert_close(logits(model), expected, FLOAT32)
        model.set_adapter("default")


def test_swapping_one_side_is_refused() -> None:
    from veneer import prepare_model_for_compiled_hotswap

    with pytest.raises(ConfigError, match="cannot be swapped alone"):
        prepare_model_for_compiled_hotswap(adapted(), target_rank=4)


def t5() -> Any:
    """Two embeddings and a head with the weight of a third embedding, which the model never calls."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=23, decoder_start_token_id=0, **sizes)).eval()


def answers(model: nn.Module) -> torch.Tensor:
    return logits(model, labels=IDS)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["shared"]}, {"target_modules": ["q"], "modules_to_save": ["shared"]}]
)
def test_an_embedding_that_is_never_called_is_named(options: Any) -> None:
    with pytest.warns(VeneerWarning, match=r"shared .*weight of encoder.embed_tokens, .*ensure_weight_tying"):
        model = get_peft_model(t5(), LoraConfig(r=2, **options))
    base = answers(model)
    for name, parameter in model.named_parameters():
        if ".shared." in name and parameter.requires_grad:
            parameter.data.normal_()
    assert torch.equal(answers(model), base)


def test_the_embeddings_of_an_encoder_decoder_follow_through_their_life() -> None:
    model = get_peft_model(t5(), config(target_modules=["shared"])).eval()
    moved(model)
    base, expected = answers(t5()), answers(model)
    places = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraTiedEmbedding)}
    assert list(places) == ["encoder.embed_tokens", "decoder.embed_tokens"]
    assert isinstance(model.lm_head, LoraTiedHead) and not torch.allclose(expected, base)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [".".join(n.split(".")[2:4]) for n in trained] == [f"shared.lora_embedding_{f}" for f in "AB"]
    model(input_ids=IDS, labels=IDS).loss.backward()
    a, b = (p.detach().clone().requires_grad_() for p in trained.values())
    plain = t5()
    weight = plain.shared.weight.detach() + 3.0 * (b @ a).T
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    values = {f"{name}.weight": weight for name in names}
    torch.func.functional_call(plain, values, kwargs={"input_ids": IDS, "labels": IDS}).loss.backward()
    for mine, other in zip(trained.values(), (a, b), strict=True):
        assert_close(mine.grad, other.grad, FLOAT32)

    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert "base_model.model.decoder.embed_tokens.lora_embedding_A.default" in tensors
    other = get_peft_model(t5(), config(target_modules=["embed_tokens"])).eval()
    other.load_state_dict(tensors)
    assert torch.equal(answers(other), expected)

    model.base_model.rename_adapter("default", "first")
    model.base_model.copy_adapter("first", "second")
    twin = copy.deepcopy(model)
    model.set_adapter("second")
    twin.set_adapter("first")
    moved(twin, seed=2)
    assert torch.equal(answers(model), expected) and not torch.equal(answers(twin), expected)
    with pytest.warns(VeneerWarning, match="no adapter is active"):
        model.delete_adapter("second")
    assert torch.equal(answers(model), base)
    model.set_adapter("first")
    model.merge_adapter()
    assert_close(answers(model), expected, FLOAT32)
    with model.disable_adapter():
        assert torch.equal(answers(model), base)
    model.unmerge_adapter()
    assert torch.equal(answers(model), expected)
    merged = model.merge_and_unload()
    assert merged.shared.weight is merged.decoder.embed_tokens.weight is merged.lm_head.weight
    assert_close(answers(merged), expected, FLOAT32)
