"""The options: what cannot be right, and what a YAML file may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer import ConfigError
from veneer.errors import UnknownOptionError
from veneer.training import RunOptions, TrainOptions
from veneer.training.options import from_mapping, read_yaml

GIVEN = {"model": "m", "data": "d.jsonl", "output": "out"}


def test_wrong_options_are_named_together() -> None:
    with pytest.raises(
        ConfigError,
        match=r"learning_rate must be above 0, not -1; batch_size must be above 0, not 0; warmup_steps",
    ):
        TrainOptions(learning_rate=-1, batch_size=0, warmup_steps=-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": ""}, "model is missing: pass it"),
        ({"lora_r": 0}, "r must be"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'?"),
        ({"dtype": "bf16"}, "dtype is one of auto, float32, bfloat16, float16"),
        ({"quantize": "nf5"}, "did you mean 'nf4'?"),
        ({"method": "dpo", "packing": True}, "packing does not go with method='dpo'"),
        ({"method": "reward", "task": "seq-cls"}, "task='seq-cls' does not go with method='reward'"),
        ({"method": "kto", "batch_size": 1}, "compares the answers of a batch: batch_size must be above 1"),
        ({"task": "seq-cls", "loss_chunk_size": 8}, "loss_chunk_size does not go with task='seq-cls'"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "give only one of them"),
        ({"warmup_ratio": 1.0}, "below 1"),
        ({"epochs": float("inf")}, "epochs must be above 0 and finite, not inf"),
        ({"seed": -1}, "seed must be at least 0 and at most 4294967295, not -1"),
        ({"columns": "promt=a"}, "columns: 'promt' is no column"),
        ({"validation_split": 1.0}, "validation_split must be at least 0 and below 1"),
        ({"validation_split": 0.1, "eval_data": "e"}, "validation_split and eval_data both say"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_right_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunOptions(**{**GIVEN, **change})
    assert said in str(refused.value)


def test_the_adapter_that_they_describe() -> None:
    options = RunOptions(**GIVEN, lora_r=8, lora_alpha=32, lora_target_modules="q_proj, v_proj")
    config = options.lora_config()
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 32, True)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    bare = RunOptions(
        **GIVEN, lora_target_modules="", lora_target_parameters="experts.down_proj, gate.weight"
    )
    assert bare.lora_config().target_modules == set()
    assert bare.lora_config().target_parameters == ["experts.down_proj", "gate.weight"]
    assert RunOptions(**GIVEN, lora_target_modules=".*mlp.*").lora_config().target_modules == ".*mlp.*"
    assert RunOptions(**GIVEN, init_lora_weights="gaussian").lora_config().init_lora_weights == "gaussian"
    assert RunOptions(**GIVEN, task="seq-cls").lora_config().task_type == "SEQ_CLS"


def test_a_yaml_file_has_the_names_of_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model_name_or_path: m\nlearning-rate: 1e-3\nnum_train_epochs: 2\n"
        "lora_target_modules: [q_proj, v_proj]\nuse_dora: true\neval_data: null\n"
        "init_lora_weights: false\nbatch_size: 4\ncolumns: {prompt: question, completion: answer}\n"
    )
    assert read_yaml(file) == {
        "model": "m",
        "learning_rate": 1e-3,
        "epochs": 2.0,
        "lora_target_modules": "q_proj,v_proj",
        "use_dora": True,
        "eval_data": None,
        "init_lora_weights": "false",
        "batch_size": 4,
        "columns": "prompt=question,completion=answer",
    }


def test_unknown_keys_are_all_named_with_suggestions() -> None:
    content = {"lerning_rate": 1, "bathc-size": 2, "seed": 3, "zzz": 4, "lora_r": "many"}
    with pytest.raises(UnknownOptionError) as refused:
        from_mapping(content, "c.yaml")
    said = str(refused.value)
    assert "'lerning_rate' (did you mean 'learning_rate'?)" in said
    assert "'bathc-size' (did you mean 'batch_size'?)" in said
    assert "'zzz'" in said and "lora_r must be a whole number, not 'many'" in said


#: Twelve lines that stand for 9 to the 11th values.
LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("- a\n", "must contain keys and values"),
        ("a: [", "is not valid YAML"),
        ("seed: 2024-13-45\n", "is not valid YAML: month must be in 1..12"),
        ("seed: " + "[" * 5000, "is not valid YAML: maximum recursion depth"),
        ("seed: &a [*a]\n", "repeats its values with anchors until they are more than 100,000"),
        (LAUGHS, "repeats its values with anchors"),
        ("#" * (2**24 + 1), "is larger than 16 MiB: not the options of a run"),
        ("seed: " + "x" * 5000, "seed must be a whole number, not 'xxx"),
        ("epochs: 1\nnum-train-epochs: 2\n", "epochs is given twice"),
        ("packing: maybe\n", "packing must be true or false"),
        ("max_steps: 1.5\n", "max_steps must be a whole number"),
        ("seed: true\n", "seed must be a whole number"),
        ("seed: .inf\n", "seed must be a whole number, not inf"),
        ("max_steps: 1e400\n", "max_steps must be a whole number"),
        (f"learning_rate: 1{'0' * 400}\n", "learning_rate must be a number"),
        ("learning_rate: .nan\n", "learning_rate must be a number"),
        ("model: {a: 1}\n", "model must be a text"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_yaml_file_that_cannot_be_right(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_yaml(file)
    assert said in str(refused.value) and str(file) in str(refused.value)
    assert len(str(refused.value)) < 1000 + len(str(file))
