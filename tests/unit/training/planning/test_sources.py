"""Models from configurations, and shadows of real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.training.tiny import saved_tiny, tiny_model
from veneer.errors import TrainingError
from veneer.training.planning import empty_model, shadow


def test_a_directory_and_its_configuration_make_the_same_model(tmp_path: Path) -> None:
    place = saved_tiny(tmp_path)
    (place / "model.safetensors").unlink()
    for source in (place, place / "config.json", str(place)):
        model = empty_model(source)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert all(p.is_meta for p in model.parameters())
        assert next(model.parameters()).dtype == torch.float32
    assert next(empty_model(place, dtype="bfloat16").parameters()).dtype == torch.bfloat16


def test_the_task_chooses_the_class(tmp_path: Path) -> None:
    place = saved_tiny(tmp_path)
    model = empty_model(place, "SEQ_CLS", num_labels=5)
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.score.out_features == 5
    values = json.loads((place / "config.json").read_text()) | {
        "architectures": ["LlamaForTokenClassification"]
    }
    (place / "config.json").write_text(json.dumps(values))
    assert type(empty_model(place)).__name__ == "LlamaForTokenClassification"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a model configuration"),
        ("[]", "has no model_type"),
        ('{"hidden_size": 8}', "veneer.plan"),
        ('{"model_type": "lama"}', "did you mean 'llama'"),
        ('{"model_type": "llama", "hidden_size": "many"}', "config.json"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "config.json"),
        ('{"model_type": "vit"}', "no AutoModelForCausalLM"),
    ],
)
def test_broken_configurations_are_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(TrainingError) as caught:
            empty_model(source, "CAUSAL_LM")
        assert words in str(caught.value)


def test_places_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"has no config\.json"):
        empty_model(tmp_path)
    with pytest.raises(TrainingError, match="does not exist"):
        empty_model(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TrainingError, match="It contains an adapter: pass its base model"):
        empty_model(tmp_path)
    with pytest.raises(TrainingError, match="no model class for the task 'POETRY'"):
        empty_model(saved_tiny(tmp_path / "model"), "POETRY")
    with pytest.raises(TrainingError, match="'someone/something' cannot be loaded"):
        empty_model("someone/something")


def test_a_shadow_is_the_model_without_values() -> None:
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.note = torch.ones(3)  # a tensor that is neither parameter nor buffer
    before = {name: p.clone() for name, p in model.named_parameters()}
    empty = shadow(model)
    assert all(p.is_meta for p in (*empty.parameters(), *empty.buffers())) and empty.note.is_meta
    assert [p.dtype for p in empty.parameters()] == [p.dtype for p in model.parameters()]
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert [b.dtype for b in empty.buffers()] == [b.dtype for b in model.buffers()]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert isinstance(shadow(nn.Linear(2, 2)), nn.Linear)
