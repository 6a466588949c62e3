"""Adapters in every layout on mixtures of transformers, loaded and exported: they mean the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tolerances import BY_DTYPE, assert_close
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import AdapterFileError, ExportError, LoadMismatchError
from veneer.expert_layouts.layouts import LAYOUTS
from veneer.expert_layouts.telling import MARK
from veneer.files.read import open_adapter
from veneer.integrations.export import export_adapter
from veneer.lora_file import open_lora
from veneer.tools import convert_adapter

SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    pad_token_id=0,
)
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=12, num_experts=4, head_dim=8)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8)
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **SIZES,
            moe_intermediate_size=12,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            q_lora_rank=None,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
    ),
}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(1, 13).view(2, 6)


def base(kind: str) -> Any:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


@pytest.fixture(scope="module", params=MODELS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Tensor]:
    """A kind of model, an adapter of it that Veneer saved, and the logits with it."""
    kind, place = request.param, tmp_path_factory.mktemp(request.param)
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=["o_proj"],
        target_parameters=STACKS,
        rank_pattern={".*gate_up_proj": 4},
        base_model_name_or_path=kind,
    )
    model = get_peft_model(base(kind), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = kind
    model.save_pretrained(place / "a")
    with torch.no_grad():
        return kind, place / "a", model.eval()(IDS).logits


def without_mark(place: Path, layout: str) -> None:
    """As the program itself would have written the directory."""
    file = place / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    values = json.loads((place / "adapter_config.json").read_text())
    values.pop("peft_version", None)
    if layout == "peft-0.18":
        values["peft_version"] = "0.18.0"
    elif layout == "megatron-bridge-stacks":
        values.pop("loftq_config", None)
    elif layout in LAYOUTS and LAYOUTS[layout].form == "folded":
        values["lora_B_layout"] = "grouped_by_expert" if layout == "unsloth" else "rank_major"
    (place / "adapter_config.json").write_text(json.dumps(values))


#: Those whose outer factors are one for all experts have no place for these adapters.
TAKEN = [name for name, row in LAYOUTS.items() if row.shared != "outer"]


def over(kind: str, layout: str) -> bool:
    """Whether Megatron-Bridge's turned stacks over gpt-oss, whose shapes say nothing of it."""
    return kind == "gpt_oss" and layout == "megatron-bridge-stacks"


def expect_logits(kind: str, place: Path, logits: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base(kind), place).eval()
    with torch.no_grad():
        assert_close(model(IDS).logits, logits, BY_DTYPE[torch.float32])


@pytest.mark.parametrize("layout", TAKEN)
def test_loaded(layout: str, saved: tuple[str, Path, Tensor], tmp_path: Path) -> None:
    kind, place, logits = saved
    convert_adapter(place, tmp_path / "b", layout=layout)
    if not over(kind, layout):
        without_mark(tmp_path / "b", layout)
    expect_logits(kind, tmp_path / "b", logits)


def test_a_layout_that_is_not_pefts_is_said(saved: tuple[str, Path, Tensor], tmp_path: Path) -> None:
    kind, place, _ = saved
    convert_adapter(place, tmp_path / "b", layout="tinker")
    with pytest.warns(match="its experts are in the layout tinker"):
        PeftModel.from_pretrained(base(kind), tmp_path / "b")
    assert any(".experts.0." in path for path in open_lora(tmp_path / "b").specs)
    assert MARK in open_adapter(tmp_path / "b").metadata


@pytest.mark.parametrize("target", ["vllm", "sglang", "plain"])
def test_exported(target: str, saved: tuple[str, Path, Tensor], tmp_path: Path) -> None:
    kind, place, logits = saved
    report = export_adapter(place, tmp_path / "b", target)
    stacks = kind == "gpt_oss" and target == "vllm"
    assert report.exact and len(report.modules) == 2 + 2 * 4 * (2 if stacks else 3)
    names = load_file(tmp_path / "b" / "adapter_model.safetensors")
    block = "block_sparse_moe.experts.3.w2" if kind == "mixtral" else "mlp.experts.3.down_proj"
    block = "mlp.experts" if stacks else block
    assert f"base_model.model.model.layers.1.{block}.lora_B.weight" in names
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})
    assert sorted(config.get("target_parameters", [])) == [
        f"model.layers.{layer}.mlp.experts.{stack}"
        for layer in range(2 * stacks)
        for stack in ("down_proj", "gate_up_proj")
    ]
    expect_logits(kind, tmp_path / "b", logits)


@pytest.mark.parametrize("target", ["vllm", "plain"])
def test_exported_from_another_layout(target: str, saved: tuple[str, Path, Tensor], tmp_path: Path) -> None:
    kind, place, logits = saved
    convert_adapter(place, tmp_path / "tinker", layout="tinker")
    export_adapter(tmp_path / "tinker", tmp_path / "b", target)
    assert MARK not in open_adapter(tmp_path / "b").metadata
    expect_logits(kind, tmp_path / "b", logits)


def test_a_lone_stack_is_refused_for_vllm(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_parameters=STACKS[1:], target_modules=[], base_model_name_or_path="gpt_oss"
    )
    model = get_peft_model(base("gpt_oss"), config)
    model.peft_config["default"].base_model_name_or_path = "gpt_oss"
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ExportError, match="gate_up_proj has no update, and vLLM, for models whose experts"):
        export_adapter(tmp_path / "a", tmp_path / "b", "vllm")
    assert not (tmp_path / "b").exists()


def test_experts_that_cannot_be_read_are_listed(saved: tuple[str, Path, Tensor], tmp_path: Path) -> None:
    kind, place, _ = saved
    convert_adapter(place, tmp_path / "b", layout="tinker")
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = [name for name in tensors if "experts.w2.lora_B" in name]
    save_file({name: t for name, t in tensors.items() if name not in lost}, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match="the experts cannot be read") as error:
        PeftModel.from_pretrained(base(kind), tmp_path / "b")
    assert all(f"layers.{layer}.mlp.experts.w2: lora_B is missing" in str(error.value) for layer in (0, 1))


def test_an_ambiguous_layout_is_refused_unless_something_is_written_down(tmp_path: Path) -> None:
    """A file of no known origin, whose columns do not tell; `veneer convert` decides, and writes it down."""
    config = LoraConfig(r=2, target_parameters=STACKS, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base("mixtral"), config).save_pretrained(tmp_path / "a")
    assert open_lora(tmp_path / "a").experts is not None  # Veneer wrote it
    without_mark(tmp_path / "a", "mark of nobody")
    with pytest.raises(AdapterFileError, match=r"ambiguous, peft or unsloth: .* from_layout decides"):
        PeftModel.from_pretrained(base("mixtral"), tmp_path / "a")
    with pytest.raises(AdapterFileError, match="ambiguous"):
        open_lora(tmp_path / "a")
    shown = open_lora(tmp_path / "a", ambiguous=True).experts
    assert shown is not None and shown.others == ("unsloth",)
    convert_adapter(tmp_path / "a", tmp_path / "b", from_layout="unsloth", layout="peft")
    PeftModel.from_pretrained(base("mixtral"), tmp_path / "b")


def test_experts_of_another_size(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_parameters=STACKS, target_modules=[])
    get_peft_model(base("mixtral"), config).save_pretrained(tmp_path / "a")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    convert_adapter(tmp_path / "a", tmp_path / "b", layout="transformers-4", base=tmp_path)
    sizes = {**SIZES, "intermediate_size": 24}
    other = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))
    with pytest.raises(LoadMismatchError, match="experts have 20 rows, where gate_up_proj takes 24"):
        PeftModel.from_pretrained(other, tmp_path / "b")
