"""The reference's names and signatures: code written for it runs with the import changed."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MT5Config, MT5ForConditionalGeneration

import veneer
from tests.interop.reference import (
    both,
    expect_same_model,
    expect_same_tensors,
    output,
    peft,
    quiet,
    randomise,
)
from tests.interop.reference_models import TINY
from tests.interop.test_reference_files import KINDS, OPTIONS, config
from tests.tolerances import assert_close
from veneer.layers import LoraLayer

FUNCTIONS = """
    get_peft_config get_peft_model inject_adapter_in_model get_peft_model_state_dict set_peft_model_state_dict
    load_peft_weights get_base_model_state_dict
    set_base_model_state_dict get_layer_status get_model_status cast_mixed_precision_params get_eva_state_dict
    initialize_lora_eva_weights prepare_model_for_kbit_training preprocess_loraga replace_lora_weights_loftq
""".split()
CLASSES = """
    LoraConfig PeftConfig LoftQConfig EvaConfig LoraGAConfig LoraRuntimeConfig PeftModel PeftModelForCausalLM
    PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification
    PeftModelForQuestionAnswering PeftModelForFeatureExtraction LoraModel AutoPeftModel
    AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification
    AutoPeftModelForTokenClassification AutoPeftModelForQuestionAnswering AutoPeftModelForFeatureExtraction
""".split()
VALUES = ["PEFT_TYPE_TO_CONFIG_MAPPING", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "TaskType", "PeftType"]

METHODS: dict[str, str] = {
    "PeftModel": """
        print_trainable_parameters save_pretrained from_pretrained generate load_adapter set_adapter
        delete_adapter add_adapter disable_adapter get_base_model get_nb_trainable_parameters
        create_or_update_model_card push_to_hub forward
    """,
    "LoraModel": """
        merge_and_unload merge_adapter unmerge_adapter unload delete_adapter add_weighted_adapter
        enable_adapter_layers disable_adapter_layers set_adapter
    """,
    "LoraConfig": "to_dict save_pretrained from_pretrained",
    "AutoPeftModelForCausalLM": "from_pretrained",
}
PROPERTIES = {
    "PeftModel": "active_adapter active_adapters active_peft_config peft_config modules_to_save base_model",
    "LoraModel": "active_adapter active_adapters peft_config prefix model",
    "LoraConfig": "is_prompt_learning is_adaption_prompt",
}
LAYER_METHODS = """
    set_scale scale_layer unscale_layer merge unmerge get_delta_weight set_adapter enable_adapters
    delete_adapter get_base_layer
""".split()
LAYER_ATTRIBUTES = """
    r lora_alpha scaling lora_dropout lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector
    use_dora use_rslora lora_bias merged_adapters merged base_layer active_adapter active_adapters
    disable_adapters adapter_layer_names in_features out_features weight bias
""".split()

#: Arguments that ours takes by keyword only, or not at all, each with the reason.
OTHER_ARGUMENTS = {
    ("LoraModel", "low_cpu_mem_usage"): "by keyword",
    ("LoraModel", "state_dict"): "targets from keys are inject_adapter_in_model's",
    **{
        ("PeftModel.push_to_hub", name): "by keyword"
        for name in (
            "commit_message commit_description private token revision create_pr max_shard_size tags".split()
        )
    },
    ("LoraConfig.save_pretrained", "kwargs"): "auto_mapping_dict, which is an argument of its own",
}
PLAIN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def theirs_of(name: str) -> Any:
    for place in (peft, peft.utils, peft.helpers):
        if hasattr(place, name):
            return getattr(place, name)
    raise AttributeError(name)


def expect_compatible(label: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Every call that the reference's signature allows means the same here."""
    mine, its = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    order = [n for n, p in mine.items() if p.kind in PLAIN]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in mine.values())
    position = 0
    for name, parameter in its.items():
        if (label, name) in OTHER_ARGUMENTS:
            continue
        if parameter.kind not in PLAIN:
            assert name in mine or open_ended, f"{label}: {name}"
            continue
        assert order[position : position + 1] == [name], (
            f"{label}: {name} is not argument {position}: {order}"
        )
        position += 1
        default = mine[name].default
        if parameter.default is None or isinstance(parameter.default, bool | str | int | float):
            assert default == parameter.default, f"{label}: default of {name}"
        assert (default is inspect.Parameter.empty) <= (parameter.default is inspect.Parameter.empty)
    for name, parameter in mine.items():
        if name not in its and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert parameter.default is not inspect.Parameter.empty, (
                f"{label}: {name} is ours and has no default"
            )


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_public_names_and_their_signatures(name: str) -> None:
    assert name in veneer.__all__
    expect_compatible(name, getattr(veneer, name), theirs_of(name))


def test_public_values() -> None:
    for name in VALUES:
        assert name in veneer.__all__
    assert {t.value for t in veneer.TaskType} == {t.value for t in peft.TaskType}
    assert {t.value for t in veneer.PeftType} == {t.value for t in peft.PeftType}
    assert {k: v.__name__ for k, v in veneer.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()} == {
        k: v.__name__ for k, v in theirs_of("MODEL_TYPE_TO_PEFT_MODEL_MAPPING").items()
    }
    assert {k.value for k in veneer.PEFT_TYPE_TO_CONFIG_MAPPING} == {"LORA"}


@pytest.mark.parametrize(("cls", "name"), [(c, n) for c, names in METHODS.items() for n in names.split()])
def test_methods_and_their_signatures(cls: str, name: str) -> None:
    ours, theirs = getattr(veneer, cls), theirs_of(cls)
    expect_compatible(f"{cls}.{name}", getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_methods_of_layers(name: str) -> None:
    expect_compatible(f"LoraLayer.{name}", getattr(LoraLayer, name), getattr(peft.tuners.lora.Linear, name))


def test_attributes_of_the_base_model_show_through() -> None:
    tiny = TINY["llama"]
    ours, theirs = both(tiny.build, {"task_type": tiny.task})
    for name in ("config", "generation_config", "device", "dtype", "main_input_name", "name_or_path"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert type(found) is type(expected), name
        if name not in ("config", "generation_config"):
            assert found == expected, name
    assert ours.config is ours.get_base_model().config
    assert ours.get_input_embeddings() is ours.get_base_model().model.embed_tokens
    for model in (ours, theirs):
        with pytest.raises(AttributeError):
            model.nothing_of_that_name  # noqa: B018


def test_lora_model_alone() -> None:
    case = KINDS["linear"]
    base, inputs = case.build().eval(), case.inputs()
    given = config("linear", "plain")
    ours = veneer.LoraModel(copy.deepcopy(base), veneer.LoraConfig(**given), "default").eval()
    theirs = peft.LoraModel(copy.deepcopy(base), peft.LoraConfig(**given), "default").eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    expect_same_model(ours, theirs)
    assert_close(output(ours, inputs), output(theirs, inputs))
    assert_close(output(ours.merge_and_unload(), inputs), output(theirs.merge_and_unload(), inputs))


def test_attributes() -> None:
    ours, theirs = both(KINDS["linear"].build, config("linear", "plain"))
    for cls, names in PROPERTIES.items():
        for name in names.split():
            pair = {
                "PeftModel": (ours, theirs),
                "LoraModel": (ours.base_model, theirs.base_model),
                "LoraConfig": (ours.peft_config["default"], theirs.peft_config["default"]),
            }[cls]
            mine, its = (getattr(object, name) for object in pair)
            if isinstance(its, str | bool):
                assert mine == its, (cls, name)
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    assert ours.base_model.prefix == theirs.base_model.prefix == "lora_"
    assert isinstance(ours.peft_config, dict)
    assert ours.get_base_model() is ours.base_model.model


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_of_layers(kind: str) -> None:
    ours, theirs = both(KINDS[kind].build, config(kind, "rslora"))
    mine, its = (m.get_base_model().body.layers[0]["first"] for m in (ours, theirs))
    for name in LAYER_ATTRIBUTES:
        expected = getattr(its, name, None)
        if expected is None and not hasattr(its, name):
            continue
        if name in ("in_features", "out_features") and kind != "linear":
            continue  # the reference makes them up for modules that have none
        found = getattr(mine, name)
        if isinstance(expected, nn.Module | dict | list | tuple):
            assert len(found) == len(expected) if hasattr(expected, "__len__") else True, name
            assert (
                ("default" in found) == ("default" in expected)
                if name != "base_layer" and hasattr(expected, "__contains__")
                else True
            ), name
        elif isinstance(expected, Tensor):
            assert found.shape == expected.shape, name
    assert mine.scaling == its.scaling and mine.r == its.r and mine.lora_alpha == its.lora_alpha
    assert (
        mine.use_rslora == its.use_rslora
        and mine.use_dora == its.use_dora
        and mine.lora_bias == its.lora_bias
    )
    assert mine.adapter_layer_names == its.adapter_layer_names
    assert mine.active_adapters == its.active_adapters
    assert mine.merged is its.merged is False and mine.disable_adapters is its.disable_adapters is False


# -- configurations ----------------------------------------------------------------------------------------


def test_fields_and_defaults_of_configurations() -> None:
    for name in ("LoraConfig", "LoftQConfig", "EvaConfig", "LoraRuntimeConfig"):
        ours, theirs = getattr(veneer, name), getattr(peft, name)
        # What asks for a variant of a plug-in comes after all of the field's.
        own = ["variant", "variant_options"] if name == "LoraConfig" else []
        names = [f.name for f in dataclasses.fields(ours)]
        assert names == [*(f.name for f in dataclasses.fields(theirs)), *own]
        mine, its = dataclasses.asdict(ours()), dataclasses.asdict(theirs())
        assert [mine.pop(field) for field in own] == [None, {}][: len(own)]
        # The reference notes its own version in every configuration.
        for values in (mine, its):
            values.pop("peft_version", None)
        assert mine == its


@pytest.mark.parametrize("option", OPTIONS)
def test_configurations_convert_into_each_other(option: str) -> None:
    given = config("linear", option)
    ours, theirs = veneer.LoraConfig(**given), peft.LoraConfig(**given)
    mine, its = ours.to_dict(), theirs.to_dict()
    for values in (mine, its):
        values.pop("peft_version")
    assert mine == its
    assert peft.LoraConfig(**mine).to_dict() | {"peft_version": None} == mine | {"peft_version": None}
    assert veneer.LoraConfig(**its).to_dict() | {"peft_version": None} == its | {"peft_version": None}


def test_get_peft_config() -> None:
    given = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q"], "lora_alpha": 3}
    ours, theirs = veneer.get_peft_config(dict(given)), peft.get_peft_config(dict(given))
    assert type(ours).__name__ == type(theirs).__name__ == "LoraConfig"
    assert ours.target_modules == theirs.target_modules and ours.task_type == theirs.task_type


# -- counting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_print_trainable_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = TINY[name]
    printed = []
    for model in both(tiny.build, {"task_type": tiny.task, "bias": "lora_only"}):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    form = r"trainable params: ([\d,]+) \|\| all params: ([\d,]+) \|\| trainable%: ([\d.]+)\n"
    mine, its = (re.fullmatch(form, text) for text in printed)
    assert mine is not None and its is not None
    assert mine.groups()[:2] == its.groups()[:2]
    assert f"{float(mine[3]):.4f}" == its[3]


def test_counts_of_real_models() -> None:
    """GPT-2 and mt0-large by their configurations, on the meta device."""
    mt0 = MT5Config(
        d_model=1024, d_ff=2816, num_heads=16, num_layers=24, num_decoder_layers=24, vocab_size=250112
    )
    for kind, shape, options, trainable in (
        (GPT2LMHeadModel, GPT2Config(), {}, 294_912),
        (MT5ForConditionalGeneration, mt0, {"task_type": "SEQ_2_SEQ_LM", "r": 8}, 2_359_296),
    ):
        with torch.device("meta"):
            models = both(lambda kind=kind, shape=shape: kind(shape), options)
        counts = [m.get_nb_trainable_parameters() for m in models]
        assert counts[0] == counts[1]
        assert counts[0][0] == trainable


# -- state dicts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["plain", "lora_bias", "bias_all", "modules_to_save", "rank_pattern"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_state_dicts_of_models(kind: str, option: str) -> None:
    if (kind, option) == ("embedding", "lora_bias"):
        option = "plain"  # a table has no bias
    case = KINDS[kind]
    base, inputs = case.build().eval(), case.inputs()
    ours, theirs = both(lambda: base, config(kind, option), "mine")
    randomise(theirs)
    with quiet():
        tensors = peft.get_peft_model_state_dict(theirs, adapter_name="mine")
    result = veneer.set_peft_model_state_dict(ours, tensors, adapter_name="mine")
    assert result.missing_keys == result.unexpected_keys == []
    expect_same_model(ours, theirs)
    assert_close(output(ours, inputs), output(theirs, inputs))
    found = veneer.get_peft_model_state_dict(ours, adapter_name="mine")
    expect_same_tensors(found, tensors)
    expect_same_tensors(
        veneer.get_peft_model_state_dict(ours, state_dict=ours.state_dict(), adapter_name="mine"), tensors
    )

    randomise(ours, seed=4)
    result = peft.set_peft_model_state_dict(
        theirs, veneer.get_peft_model_state_dict(ours, adapter_name="mine"), adapter_name="mine"
    )
    assert result.unexpected_keys == []
    expect_same_model(ours, theirs)


@pytest.mark.parametrize("option", ["plain", "rslora", "rank_pattern", "modules_to_save", "exclude_modules"])
@pytest.mark.parametrize("kind", ["linear", "conv1d_of_transformers", "embedding", "conv2d"])
def test_adapters_injected_into_plain_modules(kind: str, option: str) -> None:
    case = KINDS[kind]
    base, inputs = case.build().eval(), case.inputs()
    given = config(kind, option)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    assert veneer.inject_adapter_in_model(veneer.LoraConfig(**given), ours, "mine") is ours
    with quiet():
        peft.inject_adapter_in_model(peft.LoraConfig(**given), theirs, "mine")
    randomise(theirs.eval())
    ours.eval()
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    tensors = peft.get_peft_model_state_dict(theirs, adapter_name="mine")
    veneer.set_peft_model_state_dict(ours, tensors, adapter_name="mine")
    expect_same_model(ours, theirs)
    assert_close(output(ours, inputs), output(theirs, inputs))
    expect_same_tensors(veneer.get_peft_model_state_dict(ours, adapter_name="mine"), tensors)
    assert list(ours.peft_config) == list(theirs.peft_config) == ["mine"]


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_targets_from_the_keys_of_a_state_dict(kind: str) -> None:
    """Each library injects what the other's keys show, whatever the configuration's targets say."""
    base = KINDS[kind].build().eval()
    given = config(kind, "plain") | {"target_modules": ["body.layers.0.first", "body.layers.1.second"]}
    both_models = [copy.deepcopy(base), copy.deepcopy(base)]
    veneer.inject_adapter_in_model(veneer.LoraConfig(**given), both_models[0])
    with quiet():
        peft.inject_adapter_in_model(peft.LoraConfig(**given), both_models[1])
    mine = veneer.get_peft_model_state_dict(both_models[0])
    its = peft.get_peft_model_state_dict(both_models[1])

    wrong = given | {"target_modules": ["second"]}
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    veneer.inject_adapter_in_model(veneer.LoraConfig(**wrong), ours, state_dict=its)
    with quiet(), pytest.warns(RuntimeWarning, match="additional target modules"):
        peft.inject_adapter_in_model(peft.LoraConfig(**wrong), theirs, state_dict=mine)
    names = [{n for n in m.state_dict() if "lora_" in n} for m in (ours, theirs, *both_models)]
    assert names[0] == names[1] == names[2] == names[3]
    veneer.set_peft_model_state_dict(ours, its)
    peft.set_peft_model_state_dict(theirs, its)
    expect_same_model(ours, theirs)


def test_wrong_keys_are_said_here_and_not_there() -> None:
    """The reference returns them among the missing keys of the base; ours warns, or raises if none fits."""
    base = KINDS["linear"].build()
    ours, theirs = both(lambda: base, config("linear", "plain"))
    tensors = {f"somewhere.{k}": t for k, t in veneer.get_peft_model_state_dict(ours).items() if "first" in k}
    result = peft.set_peft_model_state_dict(theirs, dict(tensors))
    assert len(result.unexpected_keys) == len(tensors)
    extra = veneer.get_peft_model_state_dict(ours) | {
        "base_model.model.nothing.lora_A.weight": torch.zeros(4, 4)
    }
    with pytest.warns(veneer.VeneerWarning, match="nothing in the model takes them"):
        result = veneer.set_peft_model_state_dict(ours, extra)
    assert result.unexpected_keys == ["base_model.model.nothing.lora_A.weight"]
    with pytest.raises(RuntimeError):
        veneer.set_peft_model_state_dict(ours, {"elsewhere.lora_A.weight": torch.zeros(4, 4)})


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate(name: str) -> None:
    tiny = TINY[name]
    base = tiny.build().eval()
    ours, theirs = both(lambda: base, {"task_type": tiny.task})
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    prompt = tiny.inputs()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = theirs.generate(input_ids=prompt, **options)
    assert torch.equal(ours.generate(input_ids=prompt, **options), expected)
    assert torch.equal(ours.generate(prompt, **options), expected)


def test_a_model_that_the_reference_has_adapted_is_refused() -> None:
    given = {"r": 2, "target_modules": ["0"]}
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(**given))
    for whole, where in ((theirs, "its root"), (theirs.get_base_model(), "0")):
        with pytest.raises(veneer.TargetError, match=rf"layers of the peft library \(at {where}\)"):
            veneer.get_peft_model(whole, veneer.LoraConfig(**given))
