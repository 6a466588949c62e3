"""PEFT's modules and names under `veneer`, and configurations of PEFT's own."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from tests.unit.net import IDS, adapted
from veneer import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from veneer.errors import AdapterFileError, ConfigError, VeneerError, VeneerWarning
from veneer.integrations.as_peft.layout import INSIDES, INSIDES_OF_MODELS, LAYOUT
from veneer.integrations.as_peft.others import stub
from veneer.layers import LoraLayer


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))


@pytest.mark.parametrize("row", [row for row in LAYOUT if row != "peft"])
def test_every_module_of_peft_is_one_of_veneers(row: str) -> None:
    module = importlib.import_module("veneer" + row.removeprefix("peft"))
    assert [name for name in LAYOUT[row] if not hasattr(module, name)] == []


def test_the_module_of_configurations_has_a_version_as_that_of_peft() -> None:
    assert importlib.import_module("veneer.config").__version__ == veneer.__version__


def test_modules_hold_veneers_own_objects() -> None:
    from veneer.peft_model import get_peft_model_state_dict
    from veneer.tuners.lora import LoraConfig as Config
    from veneer.tuners.lora.layer import LoraLayer as Layer
    from veneer.utils import TaskType

    assert Config is LoraConfig and Layer is LoraLayer and TaskType is veneer.TaskType
    assert get_peft_model_state_dict is veneer.get_peft_model_state_dict


def test_a_missing_name_says_so_where_it_is_imported() -> None:
    with pytest.raises(ImportError, match=r"'veneer\.utils' has no attribute 'nothing_like_it'"):
        from veneer.utils import nothing_like_it  # noqa: F401
    with pytest.raises(ImportError, match="methods other than LoRA: use LoraConfig"):
        from veneer import IA3Config  # noqa: F401
    with pytest.raises(AttributeError, match="methods other than LoRA: use LoraConfig"):
        veneer.IA3Config  # noqa: B018
    assert not hasattr(importlib.import_module("veneer.utils"), "nothing_like_it")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("veneer.nothing_like_it")


@pytest.mark.parametrize("name", INSIDES)
def test_peft_s_insides_say_that_they_are(name: str) -> None:
    module = importlib.import_module("veneer.utils.transformers_weight_conversion")
    with pytest.raises(VeneerError, match=f"{name} is internal to peft"):
        getattr(module, name)(None, None)


@pytest.mark.parametrize("name", INSIDES_OF_MODELS)
def test_methods_inside_peft_s_models_can_be_wrapped_and_are_not_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As axolotl and ms-swift do when they are imported."""
    from veneer.tuners.lora.model import LoraModel

    for model in (LoraModel, stub("AdaLoraModel")):
        own = getattr(model, name)
        with pytest.raises(VeneerError, match=f"{name} is internal to peft"):
            own(None)
        monkeypatch.setattr(model, name, lambda *args, own=own: own(*args))
    assert get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).active_adapters == ["default"]


def test_small_functions_agree_with_pefts() -> None:
    from peft.tuners import tuners_utils as theirs
    from peft.utils import other

    from veneer.tuners import tuners_utils as ours
    from veneer.utils import get_pattern_key, get_quantization_config, transpose

    matrix = torch.randn(2, 3)
    assert transpose(matrix, False) is matrix and torch.equal(transpose(matrix, True), matrix.T)
    for path in ("a.q_proj", "q_proj", "a.b_q_proj"):
        assert get_pattern_key(["x", "q_proj"], path) == other.get_pattern_key(["x", "q_proj"], path)
        for options in (
            {"target_modules": ["q_proj"]},
            {"target_modules": ["q_proj"], "exclude_modules": ["a.q_proj"]},
        ):
            expected = bool(theirs.check_target_module_exists(peft.LoraConfig(**options), path))
            assert ours.check_target_module_exists(LoraConfig(**options), path) is expected
    model = llama()
    assert get_quantization_config(model, "bitsandbytes") is None
    model.quantization_method, model.config.quantization_config = "own", {"bits": 4}
    assert get_quantization_config(model, "own") == {"bits": 4}
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    expected = theirs._maybe_include_all_linear_layers(peft.LoraConfig(**options), llama()).target_modules
    assert ours._maybe_include_all_linear_layers(LoraConfig(**options), llama()).target_modules == expected


def test_small_functions_on_layers() -> None:
    from veneer.helpers import DoraCaching
    from veneer.tuners.lora import Linear4bit, Linear8bitLt
    from veneer.tuners.tuners_utils import check_adapters_to_merge, onload_layer
    from veneer.utils.integrations import dequantize_module_weight

    model = adapted()
    layer = model.base_model.model.first
    assert check_adapters_to_merge(layer) == ["default"]
    assert not isinstance(layer, Linear4bit) and not isinstance(model, Linear8bitLt)
    assert torch.equal(dequantize_module_weight(layer.base_layer), layer.base_layer.weight)
    with onload_layer(layer):
        expected = model(IDS)
    with DoraCaching() as caching:
        assert caching is None and torch.equal(model(IDS), expected)
    DoraCaching()(enabled=False)
    model.merge_adapter()
    assert check_adapters_to_merge(layer, ["default"]) == []
    with pytest.raises(TypeError, match="'default'"):
        check_adapters_to_merge(layer, "default")
    with pytest.raises(VeneerError, match="Linear4bit"):
        Linear4bit()


def test_a_layer_is_of_the_class_of_its_storage() -> None:
    from veneer.tuners.lora import Linear4bit, Linear8bitLt

    class Linear4bitLike(nn.Linear):
        pass

    Linear4bitLike.__name__ = "Linear4bit"
    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    assert not isinstance(model[0], Linear4bit)
    model[0].base_layer.__class__ = Linear4bitLike
    assert isinstance(model[0], Linear4bit) and not isinstance(model[0], Linear8bitLt)


# -- configurations of the peft library


def test_a_configuration_of_the_peft_library_is_converted() -> None:
    theirs = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM"
    )
    before = copy.deepcopy(theirs)
    model = get_peft_model(llama(), theirs)
    config = model.peft_config["default"]
    assert type(model) is veneer.PeftModelForCausalLM and type(config) is LoraConfig
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 12, {"q_proj"})
    model.add_adapter("second", theirs)
    PeftModel(llama(), theirs)
    inject_adapter_in_model(theirs, llama())
    assert theirs == before
    with pytest.raises(ConfigError, match="IA3"):
        get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="a LoraConfig is needed, got dict"):
        get_peft_model(llama(), {"r": 4})  # type: ignore[arg-type]


def test_transformers_add_adapter_takes_a_configuration_of_veneers_beside_peft() -> None:
    model = llama()
    config = LoraConfig(r=3, target_modules="q_proj")
    with pytest.warns(VeneerWarning, match="layers of the installed peft library"):
        model.add_adapter(config)
    assert isinstance(model.peft_config["default"], peft.LoraConfig) and model.active_adapters() == [
        "default"
    ]
    assert model.model.layers[0].self_attn.q_proj.r == {"default": 3}
    assert config == LoraConfig(r=3, target_modules="q_proj")


# -- the hub


def test_pushing_without_a_network_says_that_it_was_pushing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterFileError, match="nothing was pushed to a/b: HF_HUB_OFFLINE=1 is set"):
        adapted().push_to_hub("a/b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    class TransportError(Exception):
        pass

    def fail(*args: Any, **kwargs: Any) -> None:
        raise TransportError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(AdapterFileError, match=r"nothing was pushed to a/b: the hub at .* did not answer"):
        LoraConfig().push_to_hub("a/b")

    def wrong(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", wrong)
    with pytest.raises(ZeroDivisionError):
        LoraConfig().push_to_hub("a/b")
