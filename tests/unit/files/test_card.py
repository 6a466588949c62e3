from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from veneer.files.card import hub_id, merge_card, model_card

CONFIG = {
    "base_model_name_or_path": "org/Some-Model_1.5",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["v_proj", "q_proj"],
    "use_rslora": True,
}


def front(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card() -> None:
    card = model_card(CONFIG, transformers_model=True, parameters=1234)
    assert front(card) == {
        "base_model": "org/Some-Model_1.5",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/Some-Model_1.5", "lora", "transformers"],
    }
    assert "r = 8, lora_alpha = 16, use_rslora, adapted: q_proj, v_proj, 1,234 parameters." in card
    assert "AutoPeftModelForCausalLM.from_pretrained" in card and "`peft`" in card


def test_a_card_of_a_model_without_an_id() -> None:
    card = model_card({**CONFIG, "base_model_name_or_path": "/home/me/secret"})
    assert "secret" not in card and "base_model:" not in card
    assert front(card) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    assert "# LoRA adapter\n" in card and "PeftModel.from_pretrained(base_model" in card


@pytest.mark.parametrize("name", ["gpt2", "org/model", "org/Model-1.5_x", "123", "null", "1e5"])
def test_ids_are_strings_in_yaml(name: str) -> None:
    assert hub_id(name) == name
    assert front(model_card({"base_model_name_or_path": name}))["base_model"] == name


@pytest.mark.parametrize(
    "name",
    [
        *["", None, 3, "/abs/path", "./rel", "../up", "~/models/x", "C:\\models", "a/b/c", "with space"],
        *["a--b", "a..b", "x\ny", "out/checkpoint-500", "model.safetensors", "a" * 97, "-x", "org/.hidden"],
    ],
)
def test_paths_are_no_ids(name: object) -> None:
    assert hub_id(name) is None


def test_an_existing_path_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/first") == "runs/first"
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert hub_id("runs/first") is None


OLD = model_card({**CONFIG, "base_model_name_or_path": "org/old"})
NEW = model_card({**CONFIG, "r": 32}, transformers_model=True)


def test_a_card_that_nobody_changed_is_renewed() -> None:
    merged = merge_card(OLD, NEW)
    assert "r = 32" in merged and "r = 8" not in merged
    assert front(merged)["base_model"] == "org/Some-Model_1.5"
    assert merge_card(NEW, NEW) == NEW


def test_the_body_of_an_edited_card_stays() -> None:
    merged = merge_card(OLD.replace("LoRA adapter", "My adapter"), NEW)
    assert "# My adapter for org/old" in merged and "r = 8" in merged and "r = 32" not in merged
    assert merge_card(merged, NEW) == merged


def test_a_pipeline_that_somebody_named_stays() -> None:
    card = merge_card("---\npipeline_tag: text-to-speech\n---\nText\n", NEW)
    assert front(card)["pipeline_tag"] == "text-to-speech"
    assert "pipeline_tag" not in front(model_card({**CONFIG, "task_type": "SEQ_CLS"}))


def test_other_front_matter_stays() -> None:
    mine = """---
license: apache-2.0
base_model:
  - org/old
  - org/older
tags:
  - mine
  - "lora"
datasets: [a, b]
model-index:
- name: x
  results:
  - task: {type: y}
---
Text
--- not a fence
---
more
"""
    merged = merge_card(mine, NEW)
    assert front(merged) == {
        "license": "apache-2.0",
        "base_model": "org/Some-Model_1.5",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["mine", "lora", "base_model:adapter:org/Some-Model_1.5", "transformers"],
        "datasets": ["a", "b"],
        "model-index": [{"name": "x", "results": [{"task": {"type": "y"}}]}],
    }
    assert merged.endswith("Text\n--- not a fence\n---\nmore\n")
    assert merge_card(merged, NEW) == merged


@pytest.mark.parametrize("tags", ["tags: []", "tags:", "tags: [lora, 'x y']", "tags: # none\n", ""])
def test_every_way_to_write_tags(tags: str) -> None:
    merged = front(merge_card(f"---\n{tags}\nlicense: mit\n---\n\nText\n", NEW))
    assert {"lora", "transformers"} <= set(merged["tags"]) and merged["license"] == "mit"
    assert ("x y" in merged["tags"]) is ("x y" in tags)


@pytest.mark.parametrize("body", ["# Title\n\nText\n", "", "\n", "---\nno end\n", "\ufeff# Title\n"])
def test_a_readme_without_front_matter(body: str) -> None:
    merged = merge_card(body, NEW)
    assert front(merged) == front(NEW)
    assert body.strip("\ufeff\n") in merged
