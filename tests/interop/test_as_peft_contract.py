"""What libraries import from peft and touch on its objects, one by one, Veneer in its place."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_python

HERE = Path(__file__).resolve().parent
START = """
import sys
sys.path.insert(0, sys.argv[1])
from veneer.as_peft import register_as_peft
register_as_peft()
from pathlib import Path
import torch
from tiny import *
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
place = Path(sys.argv[2])
"""


def test_everything_imported_at_import_time_exists(nopeft_python: Path) -> None:
    """The list of the contract; `test_what_libraries_import_is_there` reads the libraries' own sources."""
    run_python(
        """
from veneer.as_peft import register_as_peft
register_as_peft()
import importlib

IMPORTED = {
    "peft": "PeftConfig PeftModel PeftMixedModel get_peft_model LoraConfig PrefixTuningConfig "
            "PromptLearningConfig AdaptionPromptConfig get_peft_model_state_dict set_peft_model_state_dict "
            "prepare_model_for_kbit_training PeftType TaskType inject_adapter_in_model __version__",
    "peft.config": "__version__ PeftConfigMixin",
    "peft.import_utils": "is_torchao_available is_bnb_available is_bnb_4bit_available",
    "peft.optimizers": "create_loraplus_optimizer create_lorafa_optimizer create_riemannian_optimizer",
    "peft.tuners.adalora": "AdaLoraModel AdaLoraLayer RankAllocator",
    "peft.tuners.tuners_utils": "BaseTunerLayer BaseTuner onload_layer check_adapters_to_merge "
                                "check_target_module_exists _maybe_include_all_linear_layers",
    "peft.tuners.lora": "LoraLayer LoraConfig LoraModel Linear Embedding Conv2d Linear4bit Linear8bitLt",
    "peft.tuners.lora.bnb": "Linear4bit Linear8bitLt",
    "peft.tuners.lora.layer": "LoraLayer Linear ParamWrapper",
    "peft.tuners.lora.tp_layer": "LoraParallelLinear",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer factorization",
    "peft.helpers": "disable_input_dtype_casting",
    "peft.utils": "ModulesToSaveWrapper _get_submodules get_peft_model_state_dict transpose "
                  "get_quantization_config CONFIG_NAME",
    "peft.utils.integrations": "dequantize_module_weight gather_params_ctx init_empty_weights",
    "peft.utils.other": "AuxiliaryTrainingWrapper fsdp_auto_wrap_policy get_pattern_key "
                        "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
    "peft.utils.hotswap": "check_hotswap_configs_compatible hotswap_adapter_from_state_dict "
                          "prepare_model_for_compiled_hotswap hotswap_adapter",
    "peft.functional": "delete_adapter set_adapter set_requires_grad cast_adapter_dtype",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping "
        "convert_peft_config_for_transformers get_model_conversion_mapping",
}
lacking = []
for name, words in IMPORTED.items():
    module = importlib.import_module(name)
    lacking += [f"{name}.{word}" for word in words.split() if not hasattr(module, word)]
assert not lacking, lacking

import peft, veneer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper

assert list(LoHaLayer.adapter_layer_names) == list(LoKrLayer.adapter_layer_names) == []
assert LoraLayer.adapter_layer_names == (
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"
)
assert callable(AuxiliaryTrainingWrapper.adapter_state_dict_load_map)
assert peft.PeftConfig is veneer.PeftConfig and peft.get_peft_model is veneer.get_peft_model
assert peft.PeftType("PREFIX_TUNING") is not peft.PeftType.LORA
""",
        python=nopeft_python,
    )


def test_what_transformers_and_trainer_touch(nopeft_python: Path, tmp_path: Path) -> None:
    run_python(
        START
        + """
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils.hub import DownloadKwargs

model = llama()
inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), model, "mine")
config = model.peft_config["mine"]
config.inference_mode = True
assert config.peft_type.value == "LORA" and config.base_model_name_or_path is None
config.save_pretrained(place / "config")
hub = dict.fromkeys(DownloadKwargs.__annotations__)
hub.update(token=None, force_download=False, local_files_only=True)
assert len(hub) > 5
read = PeftConfig.from_pretrained(str(place / "config"), **hub)
assert isinstance(read, LoraConfig) and read.r == 2 and read.inference_mode

layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
assert len(layers) == 2
for layer in layers:
    layer.set_adapter("mine")
    assert layer.active_adapter == ["mine"]
    layer.enable_adapters(enabled=False)
    layer.enable_adapters(enabled=True)
    layer.requires_grad_(False)
assert not any(p.requires_grad for p in model.parameters())

wrapped = get_peft_model(llama(), LoraConfig(
    task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
))
assert isinstance(wrapped, PeftModel) and type(wrapped).__name__ == "PeftModelForCausalLM"
assert wrapped.get_base_model() is wrapped.base_model.model
assert wrapped.active_adapters == ["default"] and wrapped.active_adapter == "default"
assert wrapped.active_peft_config is wrapped.peft_config["default"]
assert not wrapped.active_peft_config.is_prompt_learning
shake(wrapped)
# As Trainer saves: with the whole state dict, gathered elsewhere, and from one process of several.
wrapped.save_pretrained(place / "other", state_dict=wrapped.state_dict(), is_main_process=False)
assert not (place / "other" / "adapter_model.safetensors").exists()
state = {key: value + 1 for key, value in wrapped.state_dict().items()}
wrapped.save_pretrained(str(place / "saved"), state_dict=state, is_main_process=True)
wrapped.create_or_update_model_card(str(place / "saved"))
assert "library_name: peft" in (place / "saved" / "README.md").read_text()
kept = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
wrapped.load_adapter(str(place / "saved"), "default", is_trainable=True)
now = dict(wrapped.named_parameters())
assert all(torch.equal(now[n], value + 1) and now[n].requires_grad for n, value in kept.items())
wrapped.set_adapter("default")
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


def test_what_trl_and_accelerate_touch(nopeft_python: Path, tmp_path: Path) -> None:
    run_python(
        START
        + """
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from veneer.testing.tolerances import assert_close

options = dict(r=2, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
base = llama()(X).logits
model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **options))
shake(model)
model.eval()
tuned = model(X).logits
assert is_peft_model(model) and not is_peft_model(llama())
assert not torch.allclose(tuned, base)
with model.disable_adapter():
    assert torch.equal(model(X).logits, base)
assert torch.equal(model(X).logits, tuned)

# The reference policy: a second adapter with the first one's values, never trained.
model.add_adapter("ref", LoraConfig(task_type="CAUSAL_LM", **options))
for name, parameter in model.named_parameters():
    if ".default." in name:
        model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
names = dict(model.named_parameters())
assert any(".lora_A.default." in n for n in names) and any(".base_layer." in n for n in names)
assert any("lm_head.original_module." in n for n in names)
assert any("lm_head.modules_to_save.default." in n for n in names)
assert {n for n, p in names.items() if p.requires_grad} == {n for n in names if ".default." in n}
model.set_adapter("ref")
assert torch.equal(model(X).logits, tuned)
model.set_adapter("default")
assert {n for n, p in names.items() if p.requires_grad} == {n for n in names if ".default." in n}

assert model.base_model.prefix == "lora_"
weights = {n: p.detach().clone() for n, p in names.items() if "base_layer" in n}
model.merge_adapter()
assert_close(model(X).logits, tuned)
model.unmerge_adapter()
assert all(torch.equal(names[n], value) for n, value in weights.items())
assert torch.equal(model(X).logits, tuned)
assert model.get_output_embeddings() is not None
model.enable_input_require_grads()
assert model.get_input_embeddings()(X).requires_grad

held = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
fresh = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
result = set_peft_model_state_dict(fresh, held, adapter_name=fresh.active_adapter)
assert result.unexpected_keys == [] and result.missing_keys == []
assert torch.equal(fresh(X).logits, tuned)
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


def test_what_diffusers_touches(nopeft_python: Path, tmp_path: Path) -> None:
    run_python(
        START
        + """
from peft import set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from veneer.testing.tolerances import assert_close

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
x = torch.randn(2, 6)
base = net(x)
config = LoraConfig(r=2, lora_alpha=2, target_modules=["0", "1"], rank_pattern={"^1": 3})
assert config.to_dict()["rank_pattern"] == {"^1": 3}
for name in ("a", "b"):
    inject_adapter_in_model(config, net, name)
shake(net)
layers = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
assert [len(layer.r) for layer in layers] == [2, 2]
assert [layer.r["a"] for layer in layers] == [2, 3]

def out(*names):
    for layer in layers:
        layer.set_adapter(list(names))
    return net(x).detach()

a, b, both = out("a"), out("b"), out("a", "b")
assert not torch.allclose(a, b) and not torch.allclose(both, a)
out("a")
for layer in layers:
    layer.scale_layer(0.5)
half = net(x).detach()
for layer in layers:
    layer.unscale_layer(0.5)
assert_close(net(x).detach(), a)
for layer in layers:
    layer.set_scale("a", 0.5)
assert_close(net(x).detach(), half)
for layer in layers:
    layer.set_scale("a", 1.0)

weights = [layer.get_base_layer().weight.detach().clone() for layer in layers]
for layer in layers:
    layer.merge(safe_merge=True, adapter_names=["a"])
    assert layer.merged_adapters == ["a"]
assert_close(net(x).detach(), a)
for layer, weight in zip(layers, weights):
    layer.unmerge()
    assert layer.merged_adapters == [] and torch.equal(layer.get_base_layer().weight, weight)
for layer in layers:
    layer.delete_adapter("a")
    assert len(layer.r) == 1
assert torch.equal(out("b"), b)
for layer in layers:
    layer.enable_adapters(enabled=False)
assert torch.equal(net(x), base)

try:
    LoraConfig(**{"r": 2, "no_such_option": 1})
except TypeError as error:
    assert "no_such_option" in str(error)
else:
    raise AssertionError("an option that does not exist")
keys = {"0.lora_A.weight": torch.ones(2, 6), "0.lora_B.weight": torch.ones(6, 2),
        "1.lora_A.weight": torch.ones(3, 6), "1.lora_B.weight": torch.ones(6, 3)}
assert set_peft_model_state_dict(net, keys, adapter_name="b").unexpected_keys == []
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = set_peft_model_state_dict(net, {**keys, "2.lora_A.weight": torch.ones(2, 6)}, adapter_name="b")
assert result.unexpected_keys == ["2.lora_A.weight"] and len(caught) == 1
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )
