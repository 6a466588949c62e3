"""The task classes and `pipeline(...)`: trained, saved, reloaded through every door, merged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import run_python

HERE = Path(__file__).resolve().parent
REGISTER = "from veneer.as_peft import register_as_peft\nregister_as_peft()\n"
#: What is imported before the test: the field's library first, or Veneer in its place.
DOORS = {"peft imported first": "import peft\nimport veneer\n", "as_peft": REGISTER}
START = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import transformers
import veneer
from tiny import shake
from tiny_tasks import *
from veneer import LoraConfig, PeftModel, get_peft_model
transformers.logging.disable_progress_bar()
place = Path(sys.argv[2])
"""


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest, nopeft_python: Path) -> tuple[str, Path]:
    """What to begin with, and where: `as_peft` is tried where peft is absent."""
    return DOORS[request.param], nopeft_python if request.param == "as_peft" else Path(sys.executable)


def test_each_task_trains_saves_reloads_and_merges(door: tuple[str, Path], tmp_path: Path) -> None:
    first, python = door
    run_python(
        first
        + START
        + """
from veneer.testing.tolerances import assert_close
from safetensors.torch import load_file

adapters_of(place)
for task, (make, targets, batch, wanted, head) in TASKS.items():
    folder, output = place / task / "adapter", torch.load(place / task / "output.pt")
    keys = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in key or (head and f".{head}." in key) for key in keys), sorted(keys)
    assert (head is None) == all(".lora_" in key for key in keys)

    base = type(make()).from_pretrained(place / task / "base")
    assert not torch.equal(output_of(base, task), output)
    loaded = PeftModel.from_pretrained(base, folder)
    assert type(loaded) is veneer.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    assert torch.equal(output_of(loaded, task), output), task

    name = type(loaded).__name__.replace("PeftModel", "AutoPeftModel")
    auto = getattr(veneer, name).from_pretrained(folder)
    assert type(auto) is type(loaded) and torch.equal(output_of(auto, task), output), task
    assert torch.equal(output_of(veneer.AutoPeftModel.from_pretrained(folder), task), output), task

    merged = loaded.merge_and_unload()
    assert type(merged) is type(make())
    assert_close(output_of(merged, task), output)
    merged.save_pretrained(place / task / "merged")
    again = type(merged).from_pretrained(place / task / "merged")
    assert torch.equal(output_of(again, task), output_of(merged, task)), task
""",
        HERE,
        tmp_path,
        python=python,
    )


def test_transformers_loads_each_from_the_adapter_s_directory(nopeft_python: Path, tmp_path: Path) -> None:
    """`AutoModel….from_pretrained(directory)` finds the base by the adapter's configuration."""
    run_python(
        REGISTER
        + START
        + """
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering", "FEATURE_EXTRACTION": "AutoModel",
}
adapters_of(place)
for task, name in AUTO.items():
    output = torch.load(place / task / "output.pt")
    model = getattr(transformers, name).from_pretrained(place / task / "adapter")
    assert not isinstance(model, PeftModel) and model.active_adapters() == ["default"]
    assert torch.equal(output_of(model, task), output), task
    model.save_pretrained(place / task / "again")
    loaded = PeftModel.from_pretrained(TASKS[task][0](), place / task / "again", check_base=False).eval()
    assert torch.equal(output_of(loaded, task), output), task
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


def test_pipelines_take_a_peft_model(door: tuple[str, Path], tmp_path: Path) -> None:
    """They compare the names of classes; a name that they do not expect is logged, which fails here."""
    first, python = door
    run_python(
        first
        + START
        + """
import logging
from transformers import pipeline

class Fail(logging.Handler):
    def emit(self, record):
        raise AssertionError(record.getMessage())

transformers.logging.disable_default_handler()
transformers.logging.add_handler(Fail(logging.WARNING))
words = tokenizer()
TEXT = "aa ab ac ad ae af"
ids = words(TEXT, return_tensors="pt").input_ids

def adapted(task):
    make, targets, *_ = TASKS[task]
    model = get_peft_model(make(), LoraConfig(task_type=task, r=3, lora_alpha=12, target_modules=targets))
    shake(model)
    return model.eval()

def both(kind, task, **options):
    model = adapted(task)
    given = pipeline(kind, model=model, tokenizer=words)(TEXT, **options)
    with model.disable_adapter():
        assert pipeline(kind, model=model, tokenizer=words)(TEXT, **options) != given, kind
    return model, given

# The small model has no token that ends a text.
model, given = both("text-generation", "CAUSAL_LM", max_new_tokens=4, do_sample=False, pad_token_id=0)
wanted = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
continued = words.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
assert continued and given == [{"generated_text": TEXT + continued}], (given, wanted)

model, given = both("text-classification", "SEQ_CLS", top_k=None)
scores = model(input_ids=ids).logits.softmax(-1)[0]
assert sorted((g["label"], round(g["score"], 5)) for g in given) == [
    (f"LABEL_{i}", round(float(s), 5)) for i, s in enumerate(scores.detach())
], given

model, given = both("token-classification", "TOKEN_CLS", ignore_labels=[])
best = model(input_ids=ids).logits[0].argmax(-1)
assert [g["entity"] for g in given] == [f"LABEL_{int(i)}" for i in best], (given, best)

model, given = both("feature-extraction", "FEATURE_EXTRACTION")
assert torch.equal(torch.tensor(given), model(input_ids=ids).last_hidden_state.detach())

""",
        HERE,
        tmp_path,
        python=python,
    )
