"""Configurations: the field's names and defaults, invalid values, and the file."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import peft
import pytest
from hypothesis import strategies as st

from veneer import config as config_module
from veneer.config import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftType,
    TaskType,
    get_peft_config,
    unsupported_options,
)
from veneer.errors import AdapterFileError, ConfigError, UnknownOptionError, VeneerWarning
from veneer.files.config import read_config_file
from veneer.files.layout import CONFIG_NAME
from veneer.hub import is_local

# What the reference keeps as dataclasses of its own and Veneer, which only has to refuse it, as a dictionary.
OPAQUE = {
    "velora_config": "VeloraConfig",
    "monteclora_config": "MontecloraConfig",
    "use_bdlora": "BdLoraConfig",
    "arrow_config": "ArrowConfig",
    "kasa_config": "KasaConfig",
}

#: One of each kind of option that both libraries accept, without a warning from either.
VARIED: list[dict[str, Any]] = [
    {},
    {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"]},
    {"target_modules": r".*\.(q|v)_proj", "task_type": "CAUSAL_LM", "bias": "lora_only"},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head", "embed"], "use_rslora": True},
    {"target_modules": ["q"], "exclude_modules": r".*\.3\..*", "fan_in_fan_out": True, "bias": "all"},
    {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "h"},
    {"target_modules": ["q"], "layers_to_transform": 3, "layers_pattern": ["h", "layers"]},
    {"rank_pattern": {"z": 4, "a.*": 2}, "alpha_pattern": {"q": 32, "^k": 5}},
    {"modules_to_save": ["score", "classifier"], "task_type": "SEQ_CLS", "inference_mode": True},
    {"init_lora_weights": False, "lora_bias": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "pissa_niter_16", "revision": "main"},
    {"init_lora_weights": "olora", "base_model_name_or_path": "org/model"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2, "loftq_iter": 3}},
    {"use_dora": True},
    {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q"]},
    {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    {"auto_mapping": {"base_model_class": "X", "parent_library": "y"}},
    {"layer_replication": [[0, 4], [2, 5]], "ensure_weight_tying": True},
    {"use_qalora": True, "qalora_group_size": 8},
    {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    {"megatron_config": {"a": 1}, "megatron_core": "megatron.core2"},
    {"init_lora_weights": "eva", "eva_config": {"rho": 1.5}},
    {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    {"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "unit"}},
]


def normal(values: dict[str, Any]) -> dict[str, Any]:
    """Field values without what differs by nature: the writer's version, and kinds of sequences."""
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items() if k != "peft_version"}
    return json.loads(json.dumps(plain))


def write(directory: Path, values: Any) -> Path:
    (directory / CONFIG_NAME).write_text(values if isinstance(values, str) else json.dumps(values))
    return directory


# --- the field's contract ---


def test_fields_defaults_and_order_are_the_fields() -> None:
    theirs, ours = dataclasses.fields(peft.LoraConfig), dataclasses.fields(LoraConfig)
    own = [f.name for f in ours[len(theirs) :]]
    assert own == ["variant", "variant_options"]  # of plug-ins, after all of the field's
    ours = ours[: len(theirs)]
    assert [f.name for f in ours] == [f.name for f in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.default == other.default, mine.name
        factories = mine.default_factory, other.default_factory
        assert (factories[0] is dataclasses.MISSING) == (factories[1] is dataclasses.MISSING), mine.name
    assert normal(LoraConfig().to_dict()) == normal(peft.LoraConfig().to_dict())
    names = list(inspect.signature(LoraConfig).parameters)
    assert names == [*inspect.signature(peft.LoraConfig).parameters, *own]


@pytest.mark.parametrize(
    "name", ["LoftQConfig", "EvaConfig", "LoraRuntimeConfig", "CordaConfig", "LoraGAConfig"]
)
def test_parts_have_the_fields_fields(name: str) -> None:
    theirs = getattr(peft.tuners.lora.config, name)
    ours = getattr(config_module, name)
    assert [(f.name, f.default) for f in dataclasses.fields(ours)] == [
        (f.name, f.default) for f in dataclasses.fields(theirs)
    ]


def test_enumerations_are_the_fields() -> None:
    assert {t.name: t.value for t in TaskType} == {t.name: t.value for t in peft.TaskType}
    assert {t.name: t.value for t in PeftType} == {t.name: t.value for t in peft.PeftType}


def test_positional_arguments() -> None:
    config = LoraConfig("CAUSAL_LM", "LORA", None, None, "base", None, False, 4, ["q"])
    assert (config.task_type, config.base_model_name_or_path, config.r) == ("CAUSAL_LM", "base", 4)
    assert config.target_modules == {"q"}


@pytest.mark.parametrize("value", ["SEQ_CLS", TaskType.SEQ_CLS, peft.TaskType.SEQ_CLS])
def test_a_task_by_name_or_by_either_librarys_member(value: Any) -> None:
    config = LoraConfig(task_type=value)
    assert config.task_type is TaskType.SEQ_CLS
    assert config.to_json()["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize("value", [None, "LORA", PeftType.LORA, peft.PeftType.LORA])
def test_the_type_is_lora(value: Any) -> None:
    assert LoraConfig(peft_type=value).peft_type is PeftType.LORA


@pytest.mark.parametrize("value", [["b", "a"], ("b", "a"), {"b", "a"}, frozenset("ab")])
def test_lists_of_targets_become_sets(value: Any) -> None:
    config = LoraConfig(target_modules=value, exclude_modules=value)
    assert config.target_modules == config.exclude_modules == {"a", "b"}


def test_to_dict_makes_an_equal_config() -> None:
    for options in VARIED:
        config = LoraConfig(**options)
        again = LoraConfig(**config.to_dict())
        assert again == config
        assert "runtime_config" not in config.to_dict()
        assert set(config.to_dict()) == set(peft.LoraConfig().to_dict())


def test_copies() -> None:
    config = LoraConfig(target_modules=["q"], rank_pattern={"q": 2}, init_lora_weights="eva")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == copy.copy(config) == config
    other = dataclasses.replace(config, r=3)
    assert (other.r, config.r) == (3, 8)
    with pytest.raises(ConfigError):
        dataclasses.replace(config, r=0)


def test_a_subclass_keeps_its_own_options() -> None:
    @dataclasses.dataclass
    class Mine(LoraConfig):
        extra: int = 1

    assert Mine(r=2, extra=5).extra == 5


def test_prompt_methods_are_denied() -> None:
    assert LoraConfig().is_prompt_learning is LoraConfig().is_adaption_prompt is False


def test_the_parts_of_either_library_are_accepted() -> None:
    for part in (LoftQConfig(2, 3), peft.LoftQConfig(2, 3), {"loftq_bits": 2, "loftq_iter": 3}):
        config = LoraConfig(init_lora_weights="loftq", loftq_config=part)
        assert config.loftq_config == {"loftq_bits": 2, "loftq_iter": 3}
    assert LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5)).eva_config == EvaConfig(
        rho=1.5
    )
    assert LoraConfig(runtime_config={"ephemeral_gpu_offload": True}).runtime_config == LoraRuntimeConfig(
        True
    )


def test_initialisations_bring_their_default_options() -> None:
    assert LoraConfig(init_lora_weights="loftq").loftq_config == {"loftq_bits": 4, "loftq_iter": 1}
    assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    assert LoraConfig(init_lora_weights="corda").corda_config == CordaConfig()
    assert LoraConfig(lora_ga_config={"scale": "unit"}).lora_ga_config == LoraGAConfig(scale="unit")


# --- options that do not exist ---


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("alpha", "lora_alpha"),
        ("initialize_lora_weights", "init_lora_weights"),
        ("dropout", "lora_dropout"),
        ("rank", "r"),
        ("lora_r", "r"),
        ("target_module", "target_modules"),
        ("modules_to_saved", "modules_to_save"),
        ("use_rs_lora", "use_rslora"),
        ("lora_aplha", "lora_alpha"),
    ],
)
def test_an_unknown_option_names_the_one_meant(given: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"'{given}'.*'{meant}'") as caught:
        LoraConfig(**{given: 1})
    assert isinstance(caught.value, UnknownOptionError)


def test_all_unknown_options_are_named_at_once() -> None:
    with pytest.raises(UnknownOptionError, match=r"'alpha'.*'zzzzz'(?!.*did you mean)"):
        LoraConfig(alpha=1, zzzzz=2)


def test_the_base_class_explains_too() -> None:
    with pytest.raises(UnknownOptionError, match="task_type"):
        PeftConfig(task="CAUSAL_LM")


# --- values that cannot be right ---

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r must be an integer from 1"),
    ({"r": -1}, "r must be"),
    ({"r": True}, "r must be"),
    ({"r": 8.0}, "r must be"),
    ({"r": "8"}, "r must be"),
    ({"r": None}, "r must be"),
    ({"r": 10**15}, "r must be"),
    ({"lora_alpha": 0}, "lora_alpha must be a finite number above 0"),
    ({"lora_alpha": math.nan}, "lora_alpha"),
    ({"lora_alpha": math.inf}, "lora_alpha"),
    ({"lora_alpha": True}, "lora_alpha"),
    ({"lora_alpha": 10**5000}, "lora_alpha"),
    ({"lora_alpha": "16"}, "lora_alpha"),
    ({"lora_dropout": 1.1}, "lora_dropout must be a number from 0 to 1"),
    ({"lora_dropout": -0.1}, "lora_dropout"),
    ({"lora_dropout": math.nan}, "lora_dropout"),
    ({"lora_dropout": None}, "lora_dropout"),
    ({"bias": "lora-only"}, r"bias must be one of none, all, lora_only.*did you mean 'lora_only'"),
    ({"bias": True}, "bias"),
    ({"task_type": "CAUSALLM"}, "task_type must be one of SEQ_CLS.*did you mean 'CAUSAL_LM'"),
    ({"task_type": 3}, "task_type"),
    ({"peft_type": "IA3"}, "peft_type must be LORA in a LoraConfig, got IA3"),
    ({"peft_type": "LORAS"}, "peft_type 'LORAS' is no known adapter method.*LORA"),
    ({"target_modules": []}, "target_modules is empty, so nothing would be adapted; name the modules"),
    ({"target_modules": [], "modules_to_save": ["head"]}, "full training of modules_to_save alone"),
    ({"target_modules": ""}, "target_modules is empty"),
    ({"target_modules": ["q", ""]}, "target_modules must be"),
    ({"target_modules": ["q", 3]}, "target_modules must be"),
    ({"target_modules": 3}, "target_modules must be"),
    ({"target_modules": "(q"}, r"target_modules: '\(q' is not a valid regular expression"),
    ({"target_modules": ["q", "v["]}, r"target_modules: 'v\[' is not a valid regular expression"),
    ({"exclude_modules": ["*a"]}, r"exclude_modules: '\*a' is not a valid regular expression"),
    ({"modules_to_save": "score"}, "modules_to_save must be a list"),
    ({"modules_to_save": [1]}, "modules_to_save must be a list"),
    ({"layers_pattern": "h"}, "layers_pattern without layers_to_transform"),
    ({"layers_pattern": "h(", "layers_to_transform": 1}, "layers_pattern: 'h\\(' is not a valid"),
    ({"layers_to_transform": -1}, "layers_to_transform must be an integer from 0"),
    ({"layers_to_transform": [1, "2"]}, "layers_to_transform"),
    ({"layers_to_transform": True}, "layers_to_transform"),
    ({"layers_to_transform": "1"}, "layers_to_transform"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be an integer"),
    ({"rank_pattern": {"q": 1.5}}, "rank_pattern"),
    ({"rank_pattern": {"q(": 2}}, "rank_pattern: 'q\\(' is not a valid"),
    ({"rank_pattern": {3: 2}}, "rank_pattern: every key must be a non-empty string"),
    ({"rank_pattern": ["q"]}, "rank_pattern must be a dictionary"),
    ({"alpha_pattern": {"q": -2}}, r"alpha_pattern\['q'\] must be a finite number above 0"),
    (
        {"init_lora_weights": "gausian"},
        "must be one of True, False, gaussian.*did you mean 'gaussian'",
    ),
    ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter_<number>"),
    ({"init_lora_weights": None}, "init_lora_weights"),
    ({"init_lora_weights": 1}, "init_lora_weights"),
    (
        {"init_lora_weights": "gaussian", "lora_bias": True},
        "lora_bias=True needs init_lora_weights True or False",
    ),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "loftq_bits must be one of 2, 4, 8"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "loftq_iter"),
    ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "loftq_config has no option 'bits'"),
    ({"loftq_config": 4}, "loftq_config must be a LoftQConfig or its dictionary"),
    ({"eva_config": {"rho": 0.5}}, "eva_config.rho"),
    ({"eva_config": {"tau": 2}}, "eva_config.tau"),
    ({"corda_config": {"corda_method": "x"}}, "corda_method must be one of ipm, kpm"),
    ({"runtime_config": None}, "runtime_config"),
    ({"use_rslora": "yes"}, "use_rslora must be True or False"),
    ({"use_dora": None}, "use_dora must be True or False"),
    ({"fan_in_fan_out": 1}, "fan_in_fan_out"),
    ({"inference_mode": "no"}, "inference_mode"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a string"),
    ({"auto_mapping": []}, "auto_mapping must be a dictionary"),
    ({"target_parameters": "experts"}, "target_parameters must be a list"),
    ({"velora_config": 3}, "velora_config must be a dictionary"),
    ({"trainable_token_indices": "x"}, "trainable_token_indices must be a list or dict"),
    ({"qalora_group_size": 0}, "qalora_group_size"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=range(len(WRONG)))
def test_wrong_values_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^LoraConfig: .*{words}") as caught:
        LoraConfig(**options)
    assert "problems" not in str(caught.value)


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_alpha=-1, lora_dropout=2, bias="x", task_type="y", init_lora_weights="z",
                   target_modules="(", rank_pattern={"a": 0}, layers_pattern="h")  # fmt: skip
    message = str(caught.value)
    assert message.startswith("LoraConfig has 9 problems:\n  - ")
    for name in (
        "r must",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "task_type",
        "init_lora",
        "target_mod",
        "rank_",
        "layers_",
    ):
        assert f"\n  - {name}" in message


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 1.0},
        {"lora_dropout": 0},
        {"lora_alpha": 0.5},
        {"r": 5000},
        {"init_lora_weights": "Gaussian"},
        {"layers_to_transform": []},
    ],
)
def test_unusual_values_that_are_legal(options: dict[str, Any]) -> None:
    LoraConfig(**options)


def test_layers_to_transform_works_with_a_lone_name() -> None:
    assert LoraConfig(target_modules="q_proj", layers_to_transform=[1]).to_json()["target_modules"] == [
        "q_proj"
    ]


# --- advice ---


def test_a_small_scale_from_the_default_alpha_is_advised_against() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (advice,) = LoraConfig(r=128).advice()
    assert "0.0625" in advice
    assert "lora_alpha=128" in advice


@pytest.mark.parametrize(
    "options", [{}, {"r": 32}, {"r": 128, "lora_alpha": 16}, {"r": 128, "use_rslora": True}]
)
def test_usual_values_need_no_advice(options: dict[str, Any]) -> None:
    assert LoraConfig(**options).advice() == []


def test_other_advice() -> None:
    assert "scales the update by 64" in LoraConfig(r=1, lora_alpha=64).advice()[0]
    assert "never learns" in LoraConfig(lora_dropout=1.0).advice()[0]
    assert "loftq_config has no effect" in LoraConfig(loftq_config=LoftQConfig()).advice()[0]
    assert "use_rslora" in LoraConfig(r=2048, use_rslora=True).advice()[0]


def test_an_assigned_value_is_checked_before_advice_is_given() -> None:
    config = LoraConfig()
    config.r = 0
    with pytest.raises(ConfigError, match="r must be"):
        config.advice()


# --- the file ---


@pytest.mark.parametrize("options", VARIED, ids=lambda o: ",".join(o))
def test_the_reference_reads_our_file(options: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(**options)
    config.save_pretrained(tmp_path)
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert normal(theirs.to_dict()) == normal(config.to_dict())
    assert PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("options", VARIED, ids=lambda o: ",".join(o))
def test_we_read_the_references_file(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.LoraConfig(**options)
    theirs.save_pretrained(str(tmp_path))
    ours = PeftConfig.from_pretrained(str(tmp_path))
    assert type(ours) is LoraConfig
    assert normal(ours.to_dict()) == normal(theirs.to_dict())
    assert ours.peft_version == peft.__version__


@pytest.mark.parametrize("kind", OPAQUE)
def test_variants_of_the_reference_parse_and_are_refused_later(kind: str, tmp_path: Path) -> None:
    part = getattr(peft.tuners.lora.config, OPAQUE[kind])()
    peft.LoraConfig(**{kind: part}).save_pretrained(str(tmp_path))
    ours = PeftConfig.from_pretrained(tmp_path)
    assert getattr(ours, kind) == dataclasses.asdict(part)
    assert kind in unsupported_options(ours)[0]
    assert LoraConfig(**{kind: part}) == dataclasses.replace(ours, peft_version=None)


def test_the_file_holds_what_readers_need_and_nothing_else() -> None:
    values = LoraConfig(
        target_modules=["v", "q"], lora_alpha=16.0, alpha_pattern={"v": 4.0, "q": 0.5}
    ).to_json()
    assert values == {
        "alpha_pattern": {"v": 4, "q": 0.5},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "rank_pattern": {},
        "target_modules": ["q", "v"],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    assert list(values) == sorted(values)
    assert type(values["lora_alpha"]) is type(values["alpha_pattern"]["v"]) is int


def test_resolved_targets_can_be_written_instead() -> None:
    assert LoraConfig(target_modules="all-linear").to_json(target_modules=["v", "q", "v"])[
        "target_modules"
    ] == ["q", "v"]


def test_parts_without_their_initialisation_are_not_written() -> None:
    values = LoraConfig(loftq_config=LoftQConfig(), eva_config=EvaConfig(rho=3)).to_json()
    assert not {"loftq_config", "eva_config"} & set(values)


def test_the_order_of_patterns_survives_the_file(tmp_path: Path) -> None:
    config = LoraConfig(rank_pattern={"z": 1, "a": 2, "m": 3})
    config.save_pretrained(tmp_path)
    assert list(PeftConfig.from_pretrained(tmp_path).rank_pattern) == ["z", "a", "m"]


def test_the_files_layout(tmp_path: Path) -> None:
    LoraConfig().save_pretrained(tmp_path / "new" / "deep", auto_mapping_dict={"base_model_class": "X"})
    file = tmp_path / "new" / "deep" / CONFIG_NAME
    text = file.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert json.loads(text)["auto_mapping"] == {"base_model_class": "X"}
    assert os.listdir(file.parent) == [CONFIG_NAME]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode


def test_a_save_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(AdapterFileError, match="could not be saved: disk full"):
        LoraConfig(r=4).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [CONFIG_NAME]
    assert PeftConfig.from_pretrained(tmp_path).r == 3


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for mapping in ({"a": object()}, {"a": math.nan}):
        with pytest.raises(ConfigError, match="JSON cannot"):
            LoraConfig(auto_mapping=mapping).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_saving_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(AdapterFileError, match="not a directory"):
        LoraConfig().save_pretrained(tmp_path / "x")


# --- keys that are not known ---


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_key_that_is_off_is_ignored(value: Any) -> None:
    assert PeftConfig.from_dict({"peft_type": "LORA", "future_option": value}) == LoraConfig()


@pytest.mark.parametrize("value", [True, 1, 0, 0.5, "x", [0], {"a": None}])
def test_an_unknown_key_that_is_on_is_refused(value: Any) -> None:
    with pytest.raises(UnknownOptionError, match="future_option"):
        PeftConfig.from_dict({"peft_type": "LORA", "future_option": value})


def test_an_unknown_key_and_a_wrong_value_are_said_together(tmp_path: Path) -> None:
    write(tmp_path, {"peft_type": "LORA", "rslora": True, "r": 0})
    with pytest.raises(
        UnknownOptionError, match=r"(?s)adapter_config.json: .*'rslora' .did you mean 'use_rslora'.*r must be"
    ):
        PeftConfig.from_pretrained(tmp_path)


def test_reading_leniently_warns() -> None:
    with pytest.warns(VeneerWarning, match="future_option"):
        config = PeftConfig.from_dict({"peft_type": "LORA", "future_option": 1, "r": 2}, strict=False)
    assert config.r == 2


@pytest.mark.parametrize("key", ["runtime_config", "merge_weights", "corda_verbose"])
def test_harmless_keys_are_ignored(key: str) -> None:
    assert PeftConfig.from_dict({"peft_type": "LORA", key: {"x": True}}) == LoraConfig()


def test_a_file_of_the_first_versions_is_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "base_model_name_or_path": "org/name",
            "bias": "none",
            "enable_lora": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "merge_weights": False,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": 8,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            "use_rslora": None,
            "layers_pattern": "",
            "rank_pattern": None,
        },
    )
    assert PeftConfig.from_pretrained(tmp_path) == LoraConfig(
        base_model_name_or_path="org/name",
        inference_mode=True,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize("version", ["0.21.3", "0.22.0", "1.0", "0.22.1.dev0@abc"])
def test_a_newer_file_warns_and_reads(version: str) -> None:
    with pytest.warns(VeneerWarning, match="newer"):
        config = PeftConfig.from_dict({"peft_type": "LORA", "peft_version": version, "new_null": None})
    assert config.to_json()["peft_version"] == version


@pytest.mark.parametrize("version", ["0.21.2", "0.3.0", "0.21.2.dev0", "strange", "", None])
def test_other_versions_are_no_news(version: str | None) -> None:
    assert PeftConfig.from_dict({"peft_type": "LORA", "peft_version": version}).peft_version == version


def test_reading_a_suspicious_file_warns_of_nothing(tmp_path: Path) -> None:
    LoraConfig(r=128).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).r == 128


# --- where it is read from ---


def test_hub_arguments_are_swallowed_for_directories(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path / "sub")
    for cls in (PeftConfig, LoraConfig):
        config = cls.from_pretrained(
            tmp_path, subfolder="sub", revision="main", token=None, cache_dir="x", r=9
        )
        assert (type(config), config.r) == (LoraConfig, 3)


def test_no_word_on_the_layout_of_weights_is_the_default() -> None:
    assert LoraConfig(fan_in_fan_out=None) == LoraConfig()


def test_a_repository_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    asked = []

    def download_file(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options))
        return str(tmp_path / filename)

    monkeypatch.setattr("veneer.hub.download_file", download_file)
    config = PeftConfig.from_pretrained("org/name", subfolder="a", revision="b", token="c")
    assert config.r == 3
    assert asked == [("org/name", CONFIG_NAME, {"subfolder": "a", "revision": "b", "token": "c"})]


def test_missing_files_are_explained(tmp_path: Path) -> None:
    LoraConfig().save_pretrained(tmp_path / "mine")
    for where, subfolder, words in (
        (tmp_path, None, rf"no {CONFIG_NAME} in .* Sub-directories hold one: '.*mine'"),
        (tmp_path, "yours", "no directory .*yours'; adapters there: '.*mine'"),
        (tmp_path / "none", None, "no directory"),
        ("./none", None, "no directory"),
        (tmp_path / "mine" / CONFIG_NAME, None, "is a file; pass the directory"),
    ):
        with pytest.raises(AdapterFileError, match=words):
            PeftConfig.from_pretrained(where, subfolder=subfolder)


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("org/name", False),
        ("name", False),
        ("./a", True),
        ("/a/b", True),
        ("~/a", True),
        ("a/b/c", True),
        (r"a\b", True),
        ("", True),
    ],
)
def test_paths_and_repository_ids(name: str, local: bool) -> None:
    assert is_local(name) is local


def test_a_mistyped_path_is_no_repository_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("out/checkpoint-4")
    LoraConfig().save_pretrained(tmp_path / "out" / "checkpoint-40")
    assert is_local("out/checkpoint-4")
    with pytest.raises(AdapterFileError, match=r"no directory 'out/checkpoint-4'.*checkpoint-40"):
        PeftConfig.from_pretrained("out/checkpoint-4")


HOSTILE: list[tuple[str | bytes, str]] = [
    ("", "not valid JSON"),
    ('{"r": 8', "not valid JSON"),
    ("[1, 2]", "JSON list, not an object"),
    ('"LORA"', "JSON str"),
    ("null", "JSON NoneType"),
    (b"\xff\xfe\x00", "not valid JSON"),
    ("[" * 100_000, "nested too deeply|not valid JSON"),
    ('{"peft_type": "LORA", "r": ' + "9" * 10_000 + "}", "not valid JSON|r must be"),
    ('{"peft_type": "LORA", "auto_mapping": ' + '{"a":' * 200 + "1" + "}" * 201, "more than 32 levels"),
    ('{"peft_type": "LORA", "lora_alpha": NaN}', "lora_alpha"),
    ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha"),
    ('{"peft_type": "LORA", "r": [8]}', "r must be"),
    ('{"peft_type": "LORA", "target_modules": {"a": 1}}', "target_modules must be"),
    ('{"peft_type": "LORA", "target_modules": [["a"]]}', "target_modules must be"),
    ('{"peft_type": "LORA", "task_type": {"a": 1}}', "task_type"),
    ('{"peft_type": ["LORA"]}', "no known adapter method"),
    ('{"peft_type": "IA3"}', "type IA3; Veneer implements LORA only"),
    ('{"peft_type": "LORAS"}', "did you mean 'LORA'"),
    ('{"r": 8}', "no peft_type"),
    ("{}", "no peft_type"),
]


@pytest.mark.parametrize(("text", "words"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_give_a_clear_error(text: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((AdapterFileError, ConfigError), match=words) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert CONFIG_NAME in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.files.config.LARGEST_FILE", 1 << 20)
    write(tmp_path, '{"peft_type": "LORA"' + " " * (1 << 20) + "}")
    with pytest.raises(AdapterFileError, match="larger than 1 MiB"):
        read_config_file(tmp_path / CONFIG_NAME)


def test_what_is_no_file_and_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="cannot read"):
        PeftConfig.from_file(tmp_path)
    with pytest.raises(ConfigError, match="dictionary, not a list"):
        PeftConfig.from_dict([])


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
some_field = st.sampled_from([f.name for f in dataclasses.fields(LoraConfig) if f.name != "peft_version"])


@hypothesis.given(st.dictionaries(st.one_of(some_field, st.text(max_size=5)), json_values, max_size=5))
def test_any_json_is_read_or_refused_by_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = PeftConfig.from_dict({**values, "peft_type": "LORA"})
    except ConfigError:
        return
    config.to_json()
    assert isinstance(config.advice() + unsupported_options(config), list)


# --- what cannot be used yet ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora=True asks for the variant 'dora'"),
        ({"use_qalora": True}, "'qalora'"),
        ({"alora_invocation_tokens": [1]}, "'alora'"),
        ({"velora_config": {}}, "'velora'"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
    ],
)
def test_unsupported_options_are_named(options: dict[str, Any], words: str) -> None:
    (sentence,) = unsupported_options(LoraConfig(**options))
    assert words in sentence


def test_supported_options_are_not_named() -> None:
    assert unsupported_options(LoraConfig(use_rslora=True, lora_bias=True, target_modules="all-linear")) == []
    assert unsupported_options(LoraConfig(use_dora=True), variants=("plain", "dora")) == []
    assert (
        len(unsupported_options(LoraConfig(use_dora=True, use_qalora=True), variants=("dora", "qalora"))) == 1
    )
    pissa = LoraConfig(init_lora_weights="pissa_niter_4")
    assert unsupported_options(pissa, inits=("pissa",)) == unsupported_options(pissa) == []
    assert "pissa_niter_4" in unsupported_options(pissa, inits=("gaussian",))[0]


def test_get_peft_config() -> None:
    config = get_peft_config({"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": 4})
    assert config == LoraConfig(task_type="SEQ_2_SEQ_LM", r=4)
    for values, words in (
        ({"r": 4}, "no peft_type"),
        ({"peft_type": "ADALORA"}, "ADALORA; Veneer implements LORA only"),
        ({"peft_type": "LORA", "alpha": 4}, "lora_alpha"),
    ):
        with pytest.raises(ConfigError, match=words):
            get_peft_config(values)
    assert {PeftType.LORA: LoraConfig} == PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize(
    "values",
    [
        {"x" * 10_000: 1},
        {f"option_{n}": 1 for n in range(100_000)},
        {"corda_config": {"a" * 10_000: 1}},
        {"corda_config": {f"option_{n}": 1 for n in range(100_000)}},
    ],
)
def test_messages_about_unknown_options_are_short(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        PeftConfig.from_dict({"peft_type": "LORA", **values})
    assert len(str(refused.value)) < 4000


def test_the_content_of_a_file_as_it_is(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    assert LoraConfig.from_json_file(file) == json.loads(file.read_text())
    with pytest.raises(AdapterFileError):
        LoraConfig.from_json_file(tmp_path / "none.json")
