"""Every option of the reference's `LoraConfig`: exchanged in files in both directions, or refused by name.

Most are exchanged elsewhere; the table says where, and a new option of the reference is missed here first.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.interop import tiny
from tests.interop.reference import (
    expect_same_model,
    from_reference,
    output,
    peft,
    quiet,
    randomise,
)
from tests.interop.test_reference_alora import IDS, models
from tests.interop.test_reference_inits import SHARED, X, rows, shake, started
from tests.tolerances import assert_close

#: Option -> the test module (`test_reference_….py`) whose files hold it in both directions.
EXCHANGED: dict[str, str] = {
    **dict.fromkeys(
        "r lora_alpha lora_dropout target_modules exclude_modules fan_in_fan_out bias use_rslora lora_bias "
        "modules_to_save layers_to_transform layers_pattern rank_pattern alpha_pattern".split(),
        "files",
    ),
    **dict.fromkeys(
        "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
        "loftq_config".split(),
        "persistence",
    ),
    **dict.fromkeys("init_lora_weights eva_config corda_config lora_ga_config".split(), "options"),
    **dict.fromkeys("use_dora runtime_config".split(), "dora"),
    **dict.fromkeys("layer_replication ensure_weight_tying".split(), "tied"),
    "trainable_token_indices": "tokens",
    "target_parameters": "special_layers",
    "alora_invocation_tokens": "options",
}

#: Option -> a configuration of the reference that asks for what Veneer has not got.
REFUSED: dict[str, dict[str, Any]] = {
    "use_qalora": {"use_qalora": True},
    "qalora_group_size": {"use_qalora": True, "qalora_group_size": 8},
    "velora_config": {"velora_config": {}},
    "monteclora_config": {"monteclora_config": {}},
    "use_bdlora": {"use_bdlora": {}},
    "arrow_config": {"arrow_config": {}},
    "kasa_config": {"kasa_config": {}},
    "megatron_config": {"megatron_config": {"a": 1}},
    "megatron_core": {"megatron_config": {"a": 1}, "megatron_core": "elsewhere"},
}


def test_no_option_is_left_out() -> None:
    here = Path(__file__).parent
    assert not EXCHANGED.keys() & REFUSED.keys()
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    # It has one value, compared wherever whole configurations are.
    assert EXCHANGED.keys() | REFUSED.keys() == options - {"peft_type"}
    for option, module in EXCHANGED.items():
        assert option in (here / f"test_reference_{module}.py").read_text(), (option, module)


@pytest.mark.parametrize("option", REFUSED)
def test_a_file_that_asks_for_what_is_not_here_is_refused(option: str, tmp_path: Path) -> None:
    """An adapter of the reference whose configuration was given the option, as it writes it."""
    with quiet():
        peft.get_peft_model(tiny.llama(), peft.LoraConfig(**SHARED)).save_pretrained(tmp_path)
    place = tmp_path / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **REFUSED[option]}))
    base = tiny.llama()
    before = base.state_dict().keys()
    named = next(iter(REFUSED[option]))
    with pytest.raises(veneer.ConfigError, match=named):
        veneer.PeftModel.from_pretrained(base, tmp_path)
    assert base.state_dict().keys() == before and not hasattr(base, "peft_config")


def eva(library: Any, base: Any) -> Any:
    """A model whose adapter starts from its inputs, with ranks shared out between the layers."""
    config = library.LoraConfig(
        **SHARED, init_lora_weights="eva", eva_config=library.EvaConfig(rho=2.0, tau=0.8)
    )
    with quiet():
        model = library.get_peft_model(copy.deepcopy(base), config)
        library.initialize_lora_eva_weights(model, rows(), show_progress_bar=False)
    return model.eval()


def start(library: Any, base: Any, init: str) -> Any:
    return eva(library, base) if init == "eva" else started(library, base, init)


@pytest.mark.parametrize("init", ["orthogonal", "eva"])
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_starts_that_leave_no_trace_in_the_base(init: str, writer: str, tmp_path: Path) -> None:
    base = tiny.llama()
    model = start(veneer if writer == "ours" else peft, base, init)
    shake(model)
    with quiet():
        model.save_pretrained(tmp_path)
    if writer == "ours":
        other = from_reference(base, tmp_path)
        expect_same_model(model, other)
    else:
        other = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        expect_same_model(other, model)
    assert_close(output(other, X), output(model, X))
    assert (output(model, X) - output(base, X)).abs().max() > 0.05


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_starts_that_change_the_base_there_load_here_once_converted(init: str, tmp_path: Path) -> None:
    """Its conversion writes the difference to the start, twice the rank, over the original base."""
    base = tiny.llama()
    theirs = started(peft, base, init)
    config = theirs.peft_config["default"]
    with quiet():
        config.init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        config.init_lora_weights = init
        shake(theirs)
        theirs.save_pretrained(tmp_path / "unconverted")
        theirs.save_pretrained(
            tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "end").eval()
    assert_close(output(ours, X), output(theirs, X))
    with pytest.raises(veneer.VeneerError, match=init):
        veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "unconverted")


def test_an_activated_adapter_of_the_reference(tmp_path: Path) -> None:
    """aLoRA, from there to here; the other direction is in its own module."""
    _, theirs = models()
    randomise(theirs, seed=3)
    with quiet():
        theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    expect_same_model(ours, theirs)
    assert (
        ours.peft_config["default"].alora_invocation_tokens
        == theirs.peft_config["default"].alora_invocation_tokens
    )
    with torch.no_grad():
        assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
