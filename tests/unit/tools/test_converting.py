"""Writing a saved adapter in another layout of its experts."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.laws.expert_layouts import MIXTURES, deltas, factors, read
from tests.laws.test_expert_layouts import same, written
from veneer.config import LoraConfig, PeftConfig
from veneer.errors import AdapterFileError, ConfigError, ExportError
from veneer.expert_layouts.layouts import LAYOUTS
from veneer.lora_file import open_lora
from veneer.tools import convert_adapter


def save(place: Path, name: str, kind: str = "plain", base: str | None = "Qwen3-MoE", **keys: object) -> Path:
    """A directory as another program writes it: no metadata of Veneer's."""
    made = written(LAYOUTS[name], kind, MIXTURES["qwen3_moe"])
    place.mkdir()
    tensors = {key: tensor.contiguous().clone() for key, tensor in made.tensors.items()}
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    values = {**made.config.to_json(), "base_model_name_or_path": base, **keys}
    (place / "adapter_config.json").write_text(json.dumps(values))
    return place


def loaded(place: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    return PeftConfig.from_pretrained(place), load_file(place / "adapter_model.safetensors")


@pytest.mark.parametrize("name", [n for n, row in LAYOUTS.items() if row.shared != "outer"])
def test_directories(name: str, tmp_path: Path) -> None:
    """There and back, with the layout of what Veneer wrote told by its mark."""
    there = convert_adapter(save(tmp_path / "a", "transformers-4"), tmp_path / "b", layout=name)
    assert (there.found, there.layout, there.directory) == ("transformers-4", name, tmp_path / "b")
    assert set(there.experts.values()) == {(4, ("gate_proj", "up_proj", "down_proj"))}
    back = convert_adapter(tmp_path / "b", tmp_path / "c", layout="transformers-4")
    assert back.found == name and back.why == "veneer_expert_layout in the metadata of the tensors"
    config, tensors = loaded(tmp_path / "c")
    same(read("transformers-4", MIXTURES["qwen3_moe"], config, tensors), deltas(factors("plain")))


def test_a_pickle_becomes_safetensors(tmp_path: Path) -> None:
    source = save(tmp_path / "a", "transformers-4")
    torch.save(load_file(source / "adapter_model.safetensors"), source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    with pytest.warns(match="is a pickle"):
        report = convert_adapter(source, tmp_path / "b")
    assert report.layout == report.found == "transformers-4"
    assert not (tmp_path / "b" / "adapter_model.bin").exists()
    config, tensors = loaded(tmp_path / "b")
    same(read("transformers-4", MIXTURES["qwen3_moe"], config, tensors), deltas(factors("plain")))


def test_unsloth_says_its_order(tmp_path: Path) -> None:
    save(tmp_path / "old", "unsloth", lora_B_layout="grouped_by_expert")
    save(tmp_path / "new", "peft", lora_B_layout="rank_major")
    for name, layout in (("old", "unsloth"), ("new", "peft")):
        assert convert_adapter(tmp_path / name, tmp_path / f"{name}-each", layout="vllm").found == layout
        config, tensors = loaded(tmp_path / f"{name}-each")
        same(read("vllm", MIXTURES["qwen3_moe"], config, tensors), deltas(factors("plain")))


@pytest.mark.parametrize("layout", ["peft", "peft-0.18"])
def test_automodel_says_its_layout(layout: str, tmp_path: Path) -> None:
    """Its configuration has no version of PEFT. Without its word, shapes and the file's presence tell."""
    source = save(tmp_path / "a", layout)
    stamp = {"peft": "peft-0.19.1", "peft-0.18": "peft-0.18"}[layout]
    for values in ({"paramwrapper_layout": stamp}, {}):
        (source / "automodel_peft_config.json").write_text(json.dumps(values))
        report = convert_adapter(source, tmp_path / f"b{len(values)}", layout="vllm")
        assert report.found == layout
    assert open_lora(source).experts == (layout, report.why, (), None)
    config, tensors = loaded(tmp_path / "b1")
    same(read("vllm", MIXTURES["qwen3_moe"], config, tensors), deltas(factors("plain")))
    (source / "automodel_peft_config.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"automodel_peft_config\.json"):
        convert_adapter(source, tmp_path / "x")


def test_what_is_refused(tmp_path: Path) -> None:
    each, folded = save(tmp_path / "a", "transformers-4"), save(tmp_path / "b", "peft")
    with pytest.raises(ConfigError, match=r"no layout 'pef' \(did you mean 'peft'\?\)"):
        convert_adapter(each, tmp_path / "x", layout="pef")
    with pytest.raises(AdapterFileError, match=r"ambiguous, peft or unsloth: .* from_layout decides"):
        convert_adapter(folded, tmp_path / "x", layout="vllm")
    assert convert_adapter(folded, tmp_path / "y", layout="vllm", from_layout="peft").why == "given"
    with pytest.raises(ExportError, match=r"layout unsloth .* two axes .* for every expert"):
        convert_adapter(each, tmp_path / "x", from_layout="unsloth")
    with pytest.raises(ExportError, match="does not name: give it with base"):
        convert_adapter(save(tmp_path / "c", "transformers-4", base=None), tmp_path / "x", layout="peft")
    with pytest.raises(ExportError, match="gate_proj has another lora_A for every expert"):
        convert_adapter(each, tmp_path / "x", layout="sglang-shared")
    assert not (tmp_path / "x").exists()


def test_llama_4_keeps_its_layout(tmp_path: Path) -> None:
    """Its stacks are (experts, in, out), and PEFT takes them for (experts, out, in)."""
    source = save(tmp_path / "a", "peft-0.18", base="meta-llama/Llama-4-Scout")
    assert convert_adapter(source, tmp_path / "b").found == "peft"
    assert loaded(tmp_path / "b")[1].keys() == loaded(source)[1].keys()
    with pytest.raises(ExportError, match="the experts of Llama 4 are"):
        convert_adapter(source, tmp_path / "c", layout="sglang")
    assert not (tmp_path / "c").exists()


def test_an_adapter_without_experts(tmp_path: Path) -> None:
    place = tmp_path / "plain"
    place.mkdir()
    names = [f"base_model.model.layers.0.q_proj.lora_{role}.weight" for role in "AB"]
    save_file({names[0]: torch.ones(2, 3), names[1]: torch.ones(4, 2)}, place / "adapter_model.safetensors")
    config = LoraConfig(r=2, target_modules=["q_proj"]).to_json()
    (place / "adapter_config.json").write_text(json.dumps(config))
    assert convert_adapter(place, tmp_path / "again").found is None
    assert loaded(tmp_path / "again")[1].keys() == set(names)
    with pytest.raises(ExportError, match="has no experts, so there is no layout to choose"):
        convert_adapter(place, tmp_path / "x", layout="peft")


def archive(source: Path, place: Path) -> Path:
    """A directory as Tinker gives it."""
    with tarfile.open(place, "w") as made:
        for file in sorted(source.iterdir()):
            made.add(file, file.name)
        made.addfile(tarfile.TarInfo("checkpoint_complete"))
    return place


def test_archives_of_tinker(tmp_path: Path) -> None:
    """Its configuration may have nothing but the rank and the strength."""
    source = save(tmp_path / "a", "tinker")
    values = {name: loaded(source)[0].to_json()[name] for name in ("r", "lora_alpha", "target_modules")}
    (source / "adapter_config.json").write_text(json.dumps(values))
    packed = archive(source, tmp_path / "run.tar")
    with pytest.raises(ExportError, match="does not name: give it with base"):
        convert_adapter(packed, tmp_path / "b", layout="peft")
    report = convert_adapter(packed, tmp_path / "b", layout="peft", base="Qwen/Qwen3-30B-A3B")
    assert (report.found, report.layout) == ("tinker", "peft")
    config, tensors = loaded(tmp_path / "b")
    same(read("peft", MIXTURES["qwen3_moe"], config, tensors), deltas(factors("plain")))
    assert config.base_model_name_or_path == "Qwen/Qwen3-30B-A3B"


def test_an_archive_without_experts(tmp_path: Path) -> None:
    """The names of Tinker become those of transformers."""
    place, start = tmp_path / "dense", "base_model.model.model"
    place.mkdir()
    names = [f"{start}.{path}.lora_{role}.weight" for path in ("layers.0.mlp.up_proj", "unembed_tokens")
             for role in "AB"]  # fmt: skip
    save_file({name: torch.full((2, 2), float(i)) for i, name in enumerate(names)},
              place / "adapter_model.safetensors")  # fmt: skip
    (place / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 32, "target_modules": "all-linear"}')
    report = convert_adapter(archive(place, tmp_path / "run.tar"), tmp_path / "b", layout="peft")
    assert (report.found, report.experts) == ("tinker", {})
    config, tensors = loaded(tmp_path / "b")
    head = [name.replace("model.unembed_tokens", "lm_head") for name in names]
    assert {name: int(t[0, 0]) for name, t in tensors.items()} == dict(zip(head, range(4), strict=True))
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 32, {"lm_head", "up_proj"})
