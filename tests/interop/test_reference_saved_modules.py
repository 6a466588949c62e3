"""``modules_to_save`` means the same modules in the reference and here, and files pass in both directions."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from tests.interop.reference import (
    expect_same_model,
    expect_same_tensors,
    from_reference,
    output,
    peft,
    quiet,
    randomise,
    stored,
)
from tests.interop.reference_models import llama_config, one_text
from tests.tolerances import assert_close
from veneer.errors import LoadMismatchError, VeneerWarning
from veneer.files.layout import CONFIG_NAME, SAFETENSORS_NAME


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config()).eval()


def distilbert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config).eval()


NORMS = {"model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"}
#: The model, the options, and some of the modules that train whole by them.
CASES: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "norm": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, NORMS),
    "as LongLoRA": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "norm"]},
        {*NORMS, "model.embed_tokens"},
    ),
    "layernorm": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["layernorm"]},
        NORMS - {"model.norm"},
    ),
    "a path": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}, {"model.norm"}),
    "two heads of a task": (
        distilbert,
        {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"},
        {"classifier", "pre_classifier"},
    ),
}


def made(library: Any, base: nn.Module, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore", VeneerWarning)
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(r=3, lora_alpha=5, **options))
    return randomise(model).eval()


def whole(model: nn.Module) -> set[str]:
    """Paths of the modules of which the adapter has a copy."""
    return {
        name.removeprefix("base_model.model.").partition(".modules_to_save.")[0]
        for name, _ in model.named_parameters()
        if ".modules_to_save." in name
    }


@pytest.mark.parametrize("case", CASES)
def test_the_same_modules_train_whole(case: str) -> None:
    build, options, some = CASES[case]
    base = build()
    ours, theirs = made(veneer, base, options), made(peft, base, options)
    assert whole(ours) == whole(theirs) >= some
    expect_same_model(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_their_files_load_here(case: str, tmp_path: Path) -> None:
    build, options, _ = CASES[case]
    base = build()
    theirs = made(peft, base, options)
    with quiet():
        theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    expect_same_model(ours, theirs)
    text = one_text()
    assert_close(output(ours, text), output(theirs, text))


@pytest.mark.parametrize("case", CASES)
def test_our_files_load_there(case: str, tmp_path: Path) -> None:
    build, options, _ = CASES[case]
    base = build()
    ours = made(veneer, base, options)
    ours.save_pretrained(tmp_path)
    theirs = from_reference(base, tmp_path)
    expect_same_model(ours, theirs)
    text = one_text()
    assert_close(output(ours, text), output(theirs, text))
    again = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    expect_same_model(again, theirs)


def test_expressions_are_written_as_paths(tmp_path: Path) -> None:
    base = llama()
    options = {"target_modules": ["q_proj"], "modules_to_save": [r".*\.0\.input_layernorm", "lm_head"]}
    ours = made(veneer, base, options)
    assert whole(ours) == {"model.layers.0.input_layernorm", "lm_head"}
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["modules_to_save"] == [
        "lm_head",
        "model.layers.0.input_layernorm",
    ]
    expect_same_model(ours, from_reference(base, tmp_path))


def test_a_name_that_takes_more_than_a_whole_name_is_mentioned() -> None:
    base = llama()
    with pytest.warns(VeneerWarning) as caught:
        veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    assert [str(w.message) for w in caught] == [
        "modules_to_save 'norm' takes every module whose path ends in it, as in PEFT: "
        "model.layers.0.input_layernorm and 3 more too. For model.norm alone give the whole path"
    ]


def earlier(place: Path, base: nn.Module) -> dict[str, torch.Tensor]:
    """An adapter as earlier versions wrote it, which took ``norm`` for the one module of that name."""
    made(veneer, base, {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}).save_pretrained(
        place
    )
    file = place / CONFIG_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": ["norm"]}))
    save_file(stored(place), place / SAFETENSORS_NAME)  # without the record of what was saved
    return stored(place)


def test_files_of_earlier_versions_load_as_they_were_meant(tmp_path: Path) -> None:
    base = llama()
    tensors = earlier(tmp_path / "old", base)
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old").eval()
    assert whole(ours) == {"model.norm"}
    ours.save_pretrained(tmp_path / "new")  # under a name that means the same in both libraries
    expect_same_tensors(stored(tmp_path / "new"), tensors)
    theirs = from_reference(base, tmp_path / "new")
    expect_same_model(ours, theirs)
    text = one_text()
    assert_close(output(ours, text), output(theirs, text))


def test_where_some_copies_are_there_none_may_lack(tmp_path: Path) -> None:
    base = llama()
    made(veneer, base, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}).save_pretrained(tmp_path)
    file = tmp_path / SAFETENSORS_NAME
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.input_layernorm.weight"]
    save_file(tensors, file)
    with pytest.raises(LoadMismatchError, match=r"layers\.1\.input_layernorm"):
        veneer.PeftModel.from_pretrained(base, tmp_path)
