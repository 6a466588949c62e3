"""The report of a plan."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from tests.unit.training.tiny import tiny_model
from veneer import LoraConfig
from veneer.errors import TargetError
from veneer.training.planning import Step, plan_training


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny_model().config.save_pretrained(place)
    return place


def test_a_report_says_what_is_adapted_and_what_is_not(source: Path) -> None:
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "dwn_proj"],
        exclude_modules=["1.self_attn.q_proj"],
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = plan_training(source, config, Step(batch_size=2, sequence_length=16))
    assert [spec.path for spec in found.plan.specs] == ["model.layers.0.self_attn.q_proj"]
    assert found.plan.unmatched[0].suggestions[0] == "down_proj"
    told = json.loads(json.dumps(found.to_dict()))
    assert told["patterns"]["q_proj"] == {
        "modules": 1, "layers": [0], "paths": ["model.layers.0.self_attn.q_proj"]
    }  # fmt: skip
    assert (
        told["skipped"][0]["reason"].startswith("excluded") and told["unmatched"][0]["pattern"] == "dwn_proj"
    )
    assert told["left_out"][0]["name"] == "embed_tokens" and told["left_out"][0]["number"] == 1
    left = {group.name: group.number for group in found.left_out}
    assert (
        left["q_proj"] == 1 and left["down_proj"] == 2 and left["lm_head"] == 1 and "norm.weight" not in left
    )
    assert told["estimate"]["trainable"] == 4 * 64 and told["batch_size"] == 2 and told["given_up"] is None


def test_a_weight_that_two_modules_share_is_counted_once(tmp_path: Path) -> None:
    shape = tiny_model().config
    shape.tie_word_embeddings = True
    shape.save_pretrained(tmp_path)
    found = plan_training(tmp_path, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    left = {group.name: group.parameters for group in found.left_out}
    assert left["embed_tokens"] == shape.vocab_size * shape.hidden_size and left["lm_head"] == 0


def test_targets_that_are_nowhere_are_an_error(source: Path) -> None:
    with pytest.raises(TargetError, match="q_proj"):
        plan_training(source, LoraConfig(target_modules=["q_prj"], task_type="CAUSAL_LM"), budget="1%")


def test_a_classifier_trains_its_head(source: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    found = plan_training(source, config, Step(batch_size=2, sequence_length=16))
    assert found.architecture == "LlamaForSequenceClassification" and found.plan.modules_to_save == ("score",)
