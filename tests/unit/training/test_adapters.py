"""Adapters on disk: described from headers, put on their base, merged into a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import assert_close
from tests.unit.training.tiny import saved_tiny, tiny_model
from veneer import AdapterFileError, AdapterNameError, ConfigError, LoraConfig, VeneerError, get_peft_model
from veneer.training import adapters, load_base
from veneer.training.adapters import SAMPLE, describe, load_adapted, save_merged
from veneer.training.loading import Loading
from veneer.training.saved_adapter import SavedAdapter, read_adapter

IDS = torch.arange(8)[None] + 20


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base, _ = load_base(saved_tiny(tmp_path / "base"))
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(2)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_describe(adapter: Path) -> None:
    found = describe(adapter)
    assert found["ranks"] == [2, 4] and found["alphas"] == [6] and found["scalings"] == [1.5, 3.0]
    assert found["target_modules"] == ["down_proj", "q_proj"]
    assert found["layers"] == 4 and found["dtypes"] == ["float32"]
    assert found["base"] == str(adapter.parent / "base")
    paths = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    row = {"module": "q_proj", "count": 2, "A": [4, 32], "B": [32, 4], "parameters": 512, "paths": paths}
    assert row in found["modules"]
    assert found["parameters"] == 512 + 2 * (2 * 48 + 32 * 2)
    assert found["bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert found["others"] == []
    json.dumps(found)


def test_load_adapted_computes_with_the_adapter(adapter: Path) -> None:
    model, tokenizer = load_adapted(adapter)
    plain, _ = load_base(adapter.parent / "base")
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - plain(IDS).logits).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, plain(IDS).logits)
    assert tokenizer.chat_template


def test_another_base_can_be_given(adapter: Path, tmp_path: Path) -> None:
    moved = (adapter.parent / "base").rename(tmp_path / "moved")
    with pytest.raises(VeneerError, match="no model at"):
        load_adapted(adapter)
    model, _ = load_adapted(adapter, str(moved))
    assert model.peft_config["default"].r == 4


def test_an_adapter_that_names_no_base(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="pass it with model"):
        load_adapted(adapter)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    for act in (describe, load_adapted):
        with pytest.raises(AdapterFileError):
            act(tmp_path / "nowhere")
        with pytest.raises(AdapterFileError):
            act(tmp_path)


def test_a_broken_adapter(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for act in (describe, load_adapted):
        with pytest.raises(AdapterFileError):
            act(adapter)


def test_half_an_adapter(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(
        AdapterFileError, match=r"one of the two factors of model\.layers\.0\.self_attn\.q_proj"
    ):
        describe(adapter)


def test_another_kind_of_adapter(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM"})
    )
    with pytest.raises(AdapterFileError, match="PREFIX_TUNING"):
        describe(adapter)


def test_a_merged_model_computes_the_same(adapter: Path, tmp_path: Path) -> None:
    model, tokenizer = load_adapted(adapter)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    report, _ = save_merged(model, tokenizer, tmp_path / "merged")
    assert len(report.kept) == 4 and report.worst > 0.999
    merged, merged_tokenizer = load_base(tmp_path / "merged")
    with torch.no_grad():
        assert_close(merged(IDS).logits, expected)
    assert merged_tokenizer.chat_template == tokenizer.chat_template
    assert (tmp_path / "merged" / "generation_config.json").is_file()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_the_head_tells_of_an_adapter_without_its_base(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.training.adapters.load_base", None)
    saved = read_adapter(adapter)
    assert (saved.task, saved.config.r, saved.directory, saved.classes()) == ("CAUSAL_LM", 4, adapter, None)
    with pytest.raises(AdapterFileError):
        load_adapted(saved, others={"other": str(adapter / "nowhere")})
    with pytest.raises(AdapterNameError):
        load_adapted(saved, others={"a.b": str(adapter)})


def test_several_adapters_of_one_base(adapter: Path) -> None:
    model, _ = load_adapted(adapter, others={"other": str(adapter)})
    assert list(model.peft_config) == ["default", "other"] and model.active_adapters == ["default"]


def as_task(adapter: Path, task: str) -> SavedAdapter:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": task}))
    return read_adapter(adapter)


def test_the_classes_of_a_classifier(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved = as_task(adapter, "SEQ_CLS")
    with pytest.raises(AdapterFileError, match="contains no classification head"):
        saved.classes()
    with pytest.raises(ConfigError, match="is an adapter for CAUSAL_LM"):
        load_adapted(saved, others={"other": str(lm_beside(adapter))})
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = torch.zeros(3, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert read_adapter(adapter).classes() == ["0", "1", "2"]
    (adapter / "metrics.json").write_text('{"label_names": ["a", "b", "c"]}')
    assert read_adapter(adapter).classes() == ["a", "b", "c"]
    with pytest.raises(VeneerError, match="an adapter for TOKEN_CLS; only CAUSAL_LM"):
        as_task(adapter, "TOKEN_CLS").classes()


def lm_beside(adapter: Path) -> Path:
    """The same adapter, as one of a language model."""
    place = adapter.parent / "beside"
    place.mkdir()
    for file in adapter.iterdir():
        if file.is_file():
            (place / file.name).write_bytes(file.read_bytes())
    as_task(place, "CAUSAL_LM")
    return place


class Said:
    """Remembers the lines that were said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def bar(self, title: str, total: int) -> Any:
        raise AssertionError("nothing long is done")


@pytest.mark.parametrize("way", ["in memory", "files"])
@pytest.mark.parametrize("given", [None, "somebody/other"])
def test_a_base_of_the_hub_is_said_before_it_is_fetched(
    way: str, given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from veneer.training.merge_files import base_directory

    model: Any = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "somebody/tiny"
    model.save_pretrained(tmp_path / "adapter")
    said = Said()

    def fetch(name: str, *args: Any, **kwargs: Any) -> None:
        assert len(said.lines) == 1 and name in said.lines[0]
        raise OSError("no network")

    monkeypatch.setattr(adapters, "load_base", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises((OSError, VeneerError), match="no network"):
        if way == "in memory":
            adapters.load_adapted(tmp_path / "adapter", given, progress=said)
        else:
            base_directory(tmp_path / "adapter", given, said)
    named = "which" in said.lines[0] and str(tmp_path / "adapter") in said.lines[0]
    assert named == (given is None)


def test_what_rounding_does_to_the_outputs_is_measured(adapter: Path, tmp_path: Path) -> None:
    model, tokenizer = load_adapted(adapter, loading=Loading("bfloat16"))
    ids = tokenizer(SAMPLE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits[0].float()
        with model.disable_adapter():
            base = model(input_ids=ids).logits[0].float()
    _, drift = save_merged(model, tokenizer, tmp_path / "merged")
    merged, _ = load_base(tmp_path / "merged")
    with torch.no_grad():
        after = merged(ids).logits[0].float()
    assert drift is not None and drift.tokens == ids.shape[1]
    assert drift.share == float((after - before).norm() / (before - base).norm()) > 0
    assert drift.changed == int((after.argmax(-1) != before.argmax(-1)).sum())
    _, nothing = save_merged(*load_adapted(adapter), tmp_path / "whole")
    assert nothing is None
