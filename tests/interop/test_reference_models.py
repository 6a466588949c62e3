"""Models of transformers: tasks and their heads, default targets, all-linear, embeddings, tied weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import veneer
from tests.interop.reference import (
    both,
    expect_same_model,
    from_reference,
    output,
    peft,
    quiet,
    randomise,
    stored,
)
from tests.interop.reference_models import TINY, llama_config, one_text
from tests.interop.test_reference_special_layers import mixtral, qwen3_moe
from tests.tolerances import assert_close
from veneer import PeftModel
from veneer.inject.stacks import OLD_NAMES
from veneer.targets import DEFAULT_TARGETS


def exchange(
    base: nn.Module, inputs: Any, options: dict[str, Any], place: Path, **saving: Any
) -> tuple[Any, Any]:
    """Write with each, read with the other, compare; the adapted models, ours and theirs."""
    ours, theirs = both(lambda: base, options)
    expect_same_names(ours, theirs)
    randomise(theirs)
    with quiet():
        theirs.save_pretrained(place / "theirs", **saving)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), place / "theirs").eval()
    assert type(loaded).__name__ == type(ours).__name__ == type(theirs).__name__
    expect_same_model(loaded, theirs)
    assert_close(output(loaded, inputs), output(theirs, inputs))
    randomise(ours, seed=2)
    ours.save_pretrained(place / "ours", **saving)
    assert stored(place / "ours").keys() == stored(place / "theirs").keys()
    there = from_reference(base, place / "ours")
    assert type(there).__name__ == type(ours).__name__
    expect_same_model(ours, there)
    assert_close(output(ours, inputs), output(there, inputs))
    return ours, theirs


def expect_same_names(ours: nn.Module, theirs: nn.Module) -> None:
    for wanted in (False, True):
        names = [{n for n, p in m.named_parameters() if p.requires_grad is wanted} for m in (ours, theirs)]
        assert names[0] == names[1]


# -- tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_default_targets_and_the_head_of_the_task(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    options = {"task_type": tiny.task, "r": 3, "lora_alpha": 5}
    ours, theirs = exchange(tiny.build().eval(), tiny.inputs(), options, tmp_path)
    mine, its = ours.peft_config["default"], theirs.peft_config["default"]
    assert mine.target_modules == set(its.target_modules)
    assert mine.task_type == its.task_type == tiny.task
    heads = {"classifier", "score", "qa_outputs"}
    # The reference notes every name that a head may have; ours, the one that this model has.
    assert set(mine.modules_to_save or ()) == {
        n for n in its.modules_to_save or () if n in heads and hasattr(ours.get_base_model(), n)
    }


#: Tasks whose head the reference first adapts as one more linear and then cannot train in full: a TypeError.
BROKEN_ALL_LINEAR = {"bert_tokens", "bert_answers", "llama_tokens", "llama_answers"}


@pytest.mark.parametrize("name", sorted(BROKEN_ALL_LINEAR))
def test_all_linear_where_the_reference_adapts_the_head_first(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    base, inputs = tiny.build().eval(), tiny.inputs()
    options = {"task_type": tiny.task, "target_modules": "all-linear"}
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"), quiet():
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    ours = randomise(veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**options))).eval()
    ours.save_pretrained(tmp_path)
    there = from_reference(base, tmp_path)
    expect_same_model(ours, there)
    assert_close(output(ours, inputs), output(there, inputs))


@pytest.mark.parametrize("name", sorted(set(TINY) - BROKEN_ALL_LINEAR))
def test_all_linear(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    options = {"task_type": tiny.task, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "r": 3}
    if not any("q_proj" in path for path, _ in tiny.build().named_modules()):
        del options["rank_pattern"]
    exchange(tiny.build().eval(), tiny.inputs(), options, tmp_path)


def qwen2_moe() -> nn.Module:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1,
            shared_expert_intermediate_size=8, num_attention_heads=2, num_key_value_heads=2, num_experts=3,
            num_experts_per_tok=2, decoder_sparse_step=1, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [mixtral, qwen3_moe, qwen2_moe])
@pytest.mark.filterwarnings("ignore:.*leaves out the experts at:veneer.VeneerWarning")
def test_all_linear_over_experts(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Stacks, routers and gates as in PEFT, which leaves the stacks of Qwen2-MoE alone."""
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3}
    ours, theirs = exchange(build().eval(), one_text(), options, tmp_path)
    mine, its = ours.peft_config["default"], theirs.peft_config["default"]
    assert set(mine.target_parameters or ()) == set(its.target_parameters or ())
    assert (mine.rank_pattern, mine.alpha_pattern) == (its.rank_pattern, its.alpha_pattern)
    assert bool(mine.target_parameters) == (build is not qwen2_moe)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "hunyuan_v1_moe", "minimax", "qwen3_next"])
@pytest.mark.filterwarnings("ignore:.*leaves out:veneer.VeneerWarning")
def test_all_linear_takes_the_same_of_other_mixtures(kind: str) -> None:
    """Dense layers and shared experts among them, whose names PEFT takes for those of the stacks."""
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    known = AutoConfig.for_model(kind)
    config = type(known)(**{name: size for name, size in sizes.items() if hasattr(known, name)})
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**options), low_cpu_mem_usage=True)
    with quiet():
        theirs = peft.get_peft_model(base, peft.LoraConfig(**options), low_cpu_mem_usage=True)
    mine, its = ({n: p.shape for n, p in m.named_parameters() if "lora_" in n} for m in (ours, theirs))
    assert mine == its and any(".experts." in name for name in mine)


@pytest.mark.parametrize(
    ("build", "names"),
    [(mixtral, ["w1", "w2", "w3", "gate"]), (qwen3_moe, ["q_proj", "gate_proj", "up_proj", "down_proj"])],
)
@pytest.mark.filterwarnings("ignore:.*are adapted in their place:veneer.VeneerWarning")
def test_old_names_of_experts(build: Callable[[], nn.Module], names: list[str], tmp_path: Path) -> None:
    exchange(build().eval(), one_text(), {"target_modules": names, "r": 2}, tmp_path)


@pytest.mark.parametrize("more", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_experts_cannot_have_under_all_linear(more: dict[str, Any]) -> None:
    options = {"target_modules": "all-linear", **more}
    with pytest.raises(ValueError, match="ParamWrapper does not work with"), quiet():
        peft.get_peft_model(mixtral(), peft.LoraConfig(**options))
    with pytest.raises(veneer.TargetError, match="exclude_modules"):
        veneer.get_peft_model(mixtral(), veneer.LoraConfig(**options))


def test_parameters_in_layers_are_named_in_the_file(tmp_path: Path) -> None:
    """PEFT adapts the parameters of all layers, whatever ``layers_to_transform`` says."""
    base, inputs = mixtral().eval(), one_text()
    options = {
        "target_parameters": ["experts.down_proj"],
        "layers_to_transform": [1],
        "target_modules": ["q_proj"],
    }
    ours, theirs = both(lambda: base, options)
    assert sum("experts.lora_A" in name for name in theirs.state_dict()) == 2
    assert sum("experts.lora_A" in name for name in ours.state_dict()) == 1
    randomise(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert_close(output(loaded, inputs), output(theirs, inputs))
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    expect_same_model(ours, there := from_reference(base, tmp_path / "ours"))
    assert_close(output(ours, inputs), output(there, inputs))


def test_the_types_of_models_whose_experts_have_old_names() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    names = {
        kind: {n for n in conversion._MOE_TARGET_MODULE_MAPPING[like] if n != "gate"}
        for kind, like in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if like in conversion._MOE_TARGET_MODULE_MAPPING and kind.islower()
    }
    assert {kind: set(old) for kind, old in OLD_NAMES.items()} == names


def test_efficientnet(tmp_path: Path) -> None:
    """Its own convolutions beside plain ones, batch norms, and a head that is no sequence classifier's."""
    base = EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320, num_labels=3,
        )
    ).eval()  # fmt: skip
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    options = {
        "target_modules": ["expand_conv", "project_conv", "expand", "convolution"],
        "modules_to_save": ["classifier"],
        "r": 3,
        "lora_alpha": 5,
    }
    ours, _ = exchange(base, inputs, options, tmp_path)
    expected = output(ours, inputs)
    assert_close(output(ours.merge_and_unload(), inputs), expected)


#: Model types whose default targets differ from the reference's, with the reason.
OTHER_DEFAULTS: dict[str, str] = {
    "vit": "transformers 5 renamed the projections: both names are listed",
    "deit": "the same",
    "dinov2": "the same",
    "audio-spectrogram-transformer": "the same",
}


def test_default_targets_by_model_type() -> None:
    theirs = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def names(value: Any) -> Any:
        return value if isinstance(value, str) else set(value)

    assert not set(theirs) - set(DEFAULT_TARGETS)
    different = {t for t in theirs if names(theirs[t]) != names(DEFAULT_TARGETS[t])}
    assert different == set(OTHER_DEFAULTS) & set(theirs)
    assert all(names(theirs[t]) < names(DEFAULT_TARGETS[t]) for t in different)


# -- embeddings --------------------------------------------------------------------------------------------

EMBEDDINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "input_untied": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "output_untied": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "both_untied": ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "input_by_expression": ("llama", {"target_modules": r".*\.(embed_tokens|q_proj)"}),
    "saved_whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_targeted_embeddings_are_saved_along(name: str, tmp_path: Path) -> None:
    model, options = EMBEDDINGS[name]
    tiny = TINY[model]
    exchange(tiny.build().eval(), tiny.inputs(), options | {"task_type": tiny.task, "r": 3}, tmp_path)


@pytest.mark.parametrize("whether", [True, False])
def test_embeddings_on_demand(whether: bool, tmp_path: Path) -> None:
    tiny = TINY["llama"]
    options = {"target_modules": ["q_proj"], "task_type": tiny.task}
    exchange(tiny.build().eval(), tiny.inputs(), options, tmp_path, save_embedding_layers=whether)
    assert any("embed_tokens.weight" in key for key in stored(tmp_path / "ours")) is whether


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_tied_embeddings(targets: list[str], tmp_path: Path) -> None:
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=True)).eval()
    options = {"target_modules": [*targets, "q_proj"], "task_type": "CAUSAL_LM", "r": 3}
    with torch.no_grad():
        ours, theirs = exchange(base, one_text(), options, tmp_path)
    for model in (ours, theirs):
        inner = model.get_base_model()
        assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight
