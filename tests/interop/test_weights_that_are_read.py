"""Linears and convolutions of transformers whose weight the model reads without calling them."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.laws.snapshots import Snapshot
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, TargetError, VeneerWarning, check_training, get_peft_model
from veneer.inject.sites import plan
from veneer.layers.refused import READ

SETTING_UP = ("__init__", "_init_weights")


def _path(node: ast.expr) -> list[str]:
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*([node.id] if isinstance(node, ast.Name) else []), *names[::-1]]


def _attributes(cls: ast.ClassDef) -> tuple[set[str], set[str], set[str]]:
    """Attributes of a class that are linears or convolutions, whose weight is read, and that are called."""
    dense, read, called = set(), set(), set()
    for node in ast.walk(cls):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            kind = ast.unparse(node.value.func)
            if kind in ("nn.Linear", "nn.Conv1d", "nn.Conv2d", "nn.Conv3d"):
                dense |= {p[1] for p in map(_path, node.targets) if len(p) == 2 and p[0] == "self"}
    for method in cls.body:
        if not isinstance(method, ast.FunctionDef) or method.name in SETTING_UP:
            continue
        for node in ast.walk(method):
            if isinstance(node, ast.Call) and len(path := _path(node.func)) == 2 and path[0] == "self":
                called.add(path[1])
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                path = _path(node)
                if len(path) == 3 and path[0] == "self" and path[2] == "weight":
                    read.add(path[1])
    return dense, read, called


def _classes() -> Iterator[ast.ClassDef]:
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for text in re.split(r"(?m)^(?=class |def |@)", file.read_text(encoding="utf-8")):
            if text.startswith("class ") and re.search(r"self\.\w+\.weight\b", text):
                yield from (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))


def test_the_table_holds_what_transformers_reads_and_never_calls() -> None:
    reads: dict[str, set[str]] = defaultdict(set)
    never_called: dict[str, set[str]] = defaultdict(set)
    for cls in _classes():
        dense, read, called = _attributes(cls)
        reads[cls.name] |= dense & read
        if found := dense & read - called:
            never_called[cls.name] |= found
    assert {name: sorted(found - set(READ.get(name, ()))) for name, found in never_called.items()} == {
        name: [] for name in never_called
    }
    # What is in the table beside that is called for quantised weights only.
    beside = {(name, one) for name, own in READ.items() for one in own if one not in never_called[name]}
    assert beside == {("FalconMambaMixer", "dt_proj"), ("JambaMambaMixer", "dt_proj")}
    assert all(one in reads[name] for name, one in beside)


# -- one such model --------------------------------------------------------------------------------


def mamba() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=17,
        hidden_size=8,
        state_size=4,
        num_hidden_layers=1,
        intermediate_size=16,
        time_step_rank=2,
    )
    return transformers.MambaForCausalLM(config).eval()


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("name", ["dt_proj", "conv1d"])
@pytest.mark.parametrize("field", ["target_modules", "target_parameters"])
def test_it_is_refused_by_name(name: str, field: str) -> None:
    model = mamba()
    before = Snapshot(model)
    options = {"target_modules": ["in_proj", name]}
    if field == "target_parameters":
        options = {"target_modules": ["in_proj"], "target_parameters": [f"{name}.weight"]}
    with pytest.raises(TargetError, match=rf"mixer\.{name}.*MambaMixer reads its weight without calling it"):
        get_peft_model(model, LoraConfig(r=2, **options))
    before.assert_same(model)


def test_all_linear_leaves_it_out_with_a_word() -> None:
    with pytest.warns(VeneerWarning, match=r"dt_proj.*reads its weight without calling it"):
        model = get_peft_model(mamba(), LoraConfig(r=2, target_modules="all-linear"))
    adapted = {path.rpartition(".")[2] for path in model.base_model.layers()}
    assert adapted == {"in_proj", "x_proj", "out_proj"}
    assert "dt_proj" not in model.peft_config["default"].target_modules
    assert check_training(model, {"input_ids": IDS, "labels": IDS}).ok
    with torch.no_grad():
        for layer in model.base_model.layers().values():
            layer.lora_B["default"].weight.normal_()
    model.eval()
    unmerged = model(IDS).logits
    model.merge_adapter()
    assert_close(model(IDS).logits, unmerged)


def test_it_may_be_trained_whole() -> None:
    options = {"target_modules": ["in_proj"], "modules_to_save": ["dt_proj"]}
    model = get_peft_model(mamba(), LoraConfig(r=2, **options))
    result = check_training(model, {"input_ids": IDS, "labels": IDS})
    assert result.ok and any("dt_proj.modules_to_save" in name for name in result.trained)


def test_an_adapter_that_has_it_loads_with_a_word(tmp_path: Path) -> None:
    model = get_peft_model(mamba(), LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
    model.save_pretrained(tmp_path)
    _also_for_dt_proj(tmp_path)
    with pytest.warns(VeneerWarning, match=r"mixer\.dt_proj.*has no effect until it is merged"):
        loaded = PeftModel.from_pretrained(mamba(), tmp_path)
    assert "dt_proj" in {path.rpartition(".")[2] for path in loaded.base_model.layers()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = check_training(
            PeftModel.from_pretrained(mamba(), tmp_path, is_trainable=True), {"input_ids": IDS, "labels": IDS}
        )
    assert {name.split(".")[-4] for name in result.silent} == {"dt_proj"}
    assert "reads its weight" in str(result)


def _also_for_dt_proj(directory: Path) -> None:
    """Give a saved adapter factors of ``dt_proj``, as other libraries make them."""
    place = directory / "adapter_model.safetensors"
    tensors = load_file(place)
    prefix = "base_model.model.backbone.layers.0.mixer.dt_proj"
    tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, 2)
    tensors[f"{prefix}.lora_B.weight"] = torch.zeros(16, 2)
    save_file(tensors, place, {"format": "pt"})
    file = directory / "adapter_config.json"
    values = json.loads(file.read_text())
    values["target_modules"] = ["in_proj", "x_proj", "dt_proj"]
    file.write_text(json.dumps(values))


def test_wavlm_has_no_default_targets() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    front = {"conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.WavLMConfig(**sizes, **front, **positions)
    model = transformers.WavLMModel(config)
    with pytest.raises(TargetError, match="no default target_modules"):
        plan(model, LoraConfig())
    with pytest.raises(TargetError, match="WavLMAttention reads its weight"):
        plan(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
