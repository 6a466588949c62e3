"""Adapters of single experts, as transformers 4 had them: the reference reads the same model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import veneer
from tests.interop.reference import from_reference, output, quiet
from tests.interop.test_reference_special_layers import mixtral, qwen3_moe
from tests.tolerances import BY_DTYPE, assert_close
from veneer.errors import LoadMismatchError

PREFIX = "base_model.model."
NAMES = {
    "mixtral": (mixtral, "block_sparse_moe", {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}),
    "qwen3_moe": (
        qwen3_moe,
        "mlp",
        {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)},
    ),
}


def write(place: Path, kind: str, parts: list[str], *, r: int = 3, **more: Any) -> dict[str, Tensor]:
    """An adapter's directory under the old names."""
    _, holder, sizes = NAMES[kind]
    tensors = {}
    generator = torch.Generator().manual_seed(5)
    for layer in range(2):
        linears = {f"model.layers.{layer}.self_attn.q_proj": (16, 16)}
        if "gate" in parts:
            linears[f"model.layers.{layer}.{holder}.gate"] = (4, 16)
        for expert in range(4):
            for part in set(parts) - {"gate"}:
                linears[f"model.layers.{layer}.{holder}.experts.{expert}.{part}"] = sizes[part]
        for path, (size_out, size_in) in sorted(linears.items()):
            tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(r, size_in, generator=generator) * 0.3
            tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(size_out, r, generator=generator) * 0.3
    place.mkdir()
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": sorted({*parts, "q_proj"})}
    (place / "adapter_config.json").write_text(json.dumps(config | more))
    return tensors


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("with_router", [False, True])
def test_the_reference_reads_the_same(kind: str, with_router: bool, tmp_path: Path) -> None:
    build, _, sizes = NAMES[kind]
    base: nn.Module = build().eval()
    write(tmp_path / "old", kind, [*sizes, *(["gate"] if with_router else [])])
    inputs = {"input_ids": torch.randint(3, 31, (2, 7))}
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old")
    with quiet():
        theirs = from_reference(base, tmp_path / "old")
    expected = output(theirs, inputs)
    assert_close(output(ours, inputs), expected, BY_DTYPE[torch.float32])
    assert not torch.allclose(expected, output(base, inputs))
    ours.save_pretrained(tmp_path / "new")
    again = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new")
    assert torch.equal(output(again, inputs), output(ours, inputs))
    with quiet():
        assert_close(
            output(from_reference(base, tmp_path / "new"), inputs), expected, BY_DTYPE[torch.float32]
        )


@pytest.mark.parametrize("parts", [["w1"], ["w2"], ["w3", "w2"], ["w1", "w2", "w3"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_expert_gets_its_own_update(parts: list[str], rslora: bool, tmp_path: Path) -> None:
    tensors = write(tmp_path / "old", "mixtral", parts, use_rslora=rslora)
    base = mixtral().eval()
    merged = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old").merge_and_unload()
    scale = 4 / 3**0.5 if rslora else 4 / 3
    for layer in range(2):
        for part in parts:
            stack = "down_proj" if part == "w2" else "gate_up_proj"
            name = f"model.layers.{layer}.mlp.experts.{stack}"
            change = merged.get_parameter(name) - base.get_parameter(name)
            rows = slice(24, None) if part == "w3" else slice(0, 24)
            for expert in range(4):
                old = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                delta = scale * tensors[f"{old}.lora_B.weight"] @ tensors[f"{old}.lora_A.weight"]
                assert_close(change[expert][rows], delta, BY_DTYPE[torch.float32])
        if set(parts) == {"w1"}:
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            assert torch.equal(merged.get_parameter(name)[:, 24:], base.get_parameter(name)[:, 24:])


@pytest.mark.parametrize("kind", NAMES)
def test_a_second_adapter_of_single_experts_loads_beside_the_first(kind: str, tmp_path: Path) -> None:
    build, _, sizes = NAMES[kind]
    base = build().eval()
    write(tmp_path / "first", kind, [*sizes, "gate"])
    write(tmp_path / "second", kind, [*sizes, "gate"], r=2)
    both = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first")
    both.load_adapter(tmp_path / "second", "second")
    both.set_adapter("second")
    alone = veneer.PeftModel.from_pretrained(base, tmp_path / "second")
    inputs = {"input_ids": torch.randint(3, 31, (2, 7))}
    assert_close(output(both, inputs), output(alone, inputs), BY_DTYPE[torch.float32])


def test_dropout_is_said_and_a_missing_expert_refused(tmp_path: Path) -> None:
    write(tmp_path / "old", "mixtral", ["w2"], lora_dropout=0.1)
    with pytest.warns(veneer.VeneerWarning, match="lora_dropout"):
        veneer.PeftModel.from_pretrained(mixtral(), tmp_path / "old")
    tensors = write(tmp_path / "less", "mixtral", ["w2"])
    for name in [n for n in tensors if ".experts.3." in n]:
        del tensors[name]
    save_file(tensors, tmp_path / "less" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(LoadMismatchError, match="expert 3"):
        veneer.PeftModel.from_pretrained(mixtral(), tmp_path / "less")


def test_experts_of_different_ranks_make_no_stack(tmp_path: Path) -> None:
    tensors = write(tmp_path / "old", "mixtral", ["w2"])
    for name in [n for n in tensors if ".experts.2." in n]:
        tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        tmp_path / "old" / "adapter_model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(LoadMismatchError, match=r"ranks differ between experts \(\[2, 3\]\)"):
        veneer.PeftModel.from_pretrained(mixtral(), tmp_path / "old")
