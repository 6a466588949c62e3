"""Starts that are measured on the examples that an adapter will learn from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tolerances import assert_close
from tests.unit.training.tiny import RECORDS, Told, saved_records, saved_tiny, tiny_model
from veneer import (
    BaseMismatchError,
    ConfigError,
    DataError,
    LoraConfig,
    PeftModel,
    TargetError,
    get_peft_model,
)
from veneer.training import RunOptions, TrainOptions, encode, load_base, train
from veneer.training.run import fine_tune
from veneer.training.saved_adapter import adapter_config, read_adapter, with_adapter

#: No step moves anything: what is saved is the start.
STILL = {"epochs": 1, "learning_rate": 1e-30, "batch_size": 16, "lora_r": 4, "lora_alpha": 4}


def run(place: Path, init: str, **more: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    """The configuration and the tensors of a run that learns nothing, and what it said."""
    base, data, told = saved_tiny(place / "base"), saved_records(place / "data.jsonl"), Told()
    given = {"model": str(base), "data": str(data), "output": str(place / init), **STILL, **more}
    fine_tune(RunOptions(init_lora_weights=init, **given), told)
    values = json.loads((place / init / "adapter_config.json").read_text())
    return values, load_file(place / init / "adapter_model.safetensors"), told.lines


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The default start, which no data decide."""
    return run(tmp_path_factory.mktemp("default"), "true")[1]


@pytest.mark.parametrize("packing", [False, True])
def test_eva_is_measured_on_the_examples(
    packing: bool, default: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    values, tensors, said = run(tmp_path, "eva", packing=packing, max_length=64)
    assert values["init_lora_weights"] == "eva" and values["rank_pattern"]
    for name, a in tensors.items():
        if "lora_A" in name and a.shape == default[name].shape:
            assert not torch.allclose(a, default[name])
    rows = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert_close(rows @ rows.T, torch.eye(len(rows)))
    (tmp_path / "again").mkdir()
    _, again, _ = run(tmp_path / "again", "eva", packing=packing, max_length=64)  # as a run that is resumed
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())
    assert packing or "Initialising the adapter (eva) on 16 examples" in said


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_others_are_measured_before_the_adapter_is_in_place(
    init: str, default: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    values, tensors, said = run(tmp_path, init)
    assert any(line.startswith("Estimate: ") for line in said)
    assert values["r"] == 8 and values["init_lora_weights"] is True  # a plain adapter of twice the rank
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert tensors[name].abs().max() > 1e-3 and not default[name].half().any()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / init)
    assert loaded.peft_config["default"].init_lora_weights == init
    ids = torch.arange(12).view(2, 6)
    assert_close(loaded(ids).logits, tiny_model()(ids).logits)


def test_a_classifier_is_measured_on_all_its_tokens(tmp_path: Path) -> None:
    data = tmp_path / "classes.jsonl"
    records = [{"text": f"number {n}", "label": "odd" if n % 2 else "even"} for n in range(16)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    values, _, _ = run(tmp_path, "eva", task="seq-cls", data=str(data))
    assert values["init_lora_weights"] == "eva"


def test_the_seed_decides_a_classifiers_head_too(tmp_path: Path) -> None:
    base, data = saved_tiny(tmp_path / "base"), tmp_path / "classes.jsonl"
    data.write_text("".join(json.dumps({"text": name, "label": name}) + "\n" for name in "abab"))
    heads = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)  # whatever was drawn before the run
        output = tmp_path / str(number)
        given = {"model": str(base), "data": str(data), "output": str(output)}
        fine_tune(RunOptions(**given, task="seq-cls", seed=seed, **STILL))
        heads.append(load_file(output / "adapter_model.safetensors")["base_model.model.score.weight"])
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_an_estimate_changes_no_factor(
    default: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes only one makes it, and all must start alike."""
    monkeypatch.setattr("veneer.training.run._estimate", lambda *given: str(torch.rand(1)))
    _, found, _ = run(tmp_path, "true")
    assert all(torch.equal(found[name], tensor) for name, tensor in default.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, data, and an adapter with patterns of its own that was trained."""
    place = tmp_path_factory.mktemp("trained")
    saved_tiny(place / "base"), saved_records(place / "data.jsonl")
    base, tokenizer = load_base(place / "base")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, task_type="CAUSAL_LM"
    )
    rows = encode(RECORDS, tokenizer).rows
    train(
        get_peft_model(base, config),
        tokenizer,
        rows,
        place / "a",
        TrainOptions(max_steps=2, learning_rate=0.1),
    )
    return place


def further(place: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Train its adapter further."""
    how = {"learning_rate": 0.01, "batch_size": 4, "lr_scheduler_type": "constant", **more}
    data = str(place / "data.jsonl")
    return fine_tune(
        RunOptions(resume_from_adapter=str(place / "a"), data=data, output=str(output), **how), Told()
    )


def test_a_saved_adapter_is_trained_further(trained: Path, tmp_path: Path) -> None:
    still = further(trained, tmp_path / "still", max_steps=1, learning_rate=1e-30)
    before, after = (
        load_file(place / "adapter_model.safetensors") for place in (trained / "a", tmp_path / "still")
    )
    assert before.keys() == after.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    first, second = (
        json.loads((place / "adapter_config.json").read_text())
        for place in (trained / "a", tmp_path / "still")
    )
    assert first == second and second["rank_pattern"] == {"up_proj": 2}
    assert still["options"]["lora_target_modules"] == "q_proj,up_proj" and still["options"]["lora_r"] == 4
    whole = further(trained, tmp_path / "whole", max_steps=4)
    assert whole["losses"][-1]["loss"] < still["losses"][0]["loss"]
    further(trained, tmp_path / "cut", max_steps=4, save_steps=2)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    again = further(trained, tmp_path / "cut", max_steps=4, save_steps=2, resume=True)
    assert again["losses"] == whole["losses"]


def test_an_adapter_is_trained_further_on_its_own_base_only(trained: Path, tmp_path: Path) -> None:
    other = saved_tiny(tmp_path / "other", seed=5)
    with pytest.raises(BaseMismatchError, match="another base model"):
        further(trained, tmp_path / "out", model=str(other))
    shutil.copytree(trained / "base", tmp_path / "moved")
    further(trained, tmp_path / "out", model=str(tmp_path / "moved"), max_steps=1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")


def test_a_classifier_that_is_trained_further_keeps_its_classes(trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "classes.jsonl"
    data.write_text("".join(json.dumps({"text": name, "label": name}) + "\n" for name in "ba"))
    given = {"data": str(data), "batch_size": 2, "epochs": 1}
    first = RunOptions(
        model=str(trained / "base"), output=str(tmp_path / "first"), task="seq-cls", lora_r=2, **given
    )
    names = fine_tune(first)["label_names"]
    data.write_text(json.dumps({"text": names[1], "label": names[1]}) + "\n")
    second = RunOptions(resume_from_adapter=str(tmp_path / "first"), output=str(tmp_path / "second"), **given)
    assert fine_tune(second)["label_names"] == names
    data.write_text(json.dumps({"text": "c", "label": "c"}) + "\n")
    with pytest.raises(DataError, match="no class that is known"):
        fine_tune(second)


def test_what_contradicts_a_saved_adapter_is_listed(trained: Path) -> None:
    saved = read_adapter(trained / "a")
    options = RunOptions(
        data="d",
        output="o",
        resume_from_adapter="a",
        lora_r=8,
        use_rslora=True,
        lora_target_modules="up_proj,q_proj",
    )
    with pytest.raises(
        ConfigError, match=r"Leave out lora_r=8 \(.* has 4\), use_rslora=True \(.*\), or start"
    ):
        with_adapter(options, saved)
    assert adapter_config(replace(options, resume_from_adapter=str(trained / "a"))).rank_pattern


def test_what_a_run_cannot_start_from_is_refused_with_the_way_out() -> None:
    given = {"model": "m", "data": "d.jsonl", "output": "out"}
    with pytest.raises(ConfigError, match=r"'loftq' replaces weights.*replace_lora_weights_loftq"):
        RunOptions(**given, init_lora_weights="loftq")
    with pytest.raises(ConfigError, match=r"'eva' is measured on answers or classes.*get_peft_model"):
        RunOptions(**given, init_lora_weights="Eva", method="dpo")
    assert RunOptions(**given, init_lora_weights="pissa", method="dpo")


def test_too_few_tokens_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no batch has as many rows"):
        run(tmp_path, "eva", batch_size=1, lora_r=16, lora_alpha=16)
    assert not (tmp_path / "eva").exists()


def test_a_target_that_cannot_start_so_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="starts from directions of the layer's inputs"):
        run(tmp_path, "eva", lora_target_modules="embed_tokens,q_proj")
