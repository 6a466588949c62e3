"""Merging from file to file gives the bytes that merging in memory gives, and refuses what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tolerances import assert_close
from tests.unit.training.tiny import tiny_model, tiny_tokenizer
from veneer import AdapterFileError, BaseMismatchError, LoraConfig, MergeError, TrainingError, get_peft_model
from veneer.training.adapters import load_adapted, save_merged
from veneer.training.loading import Loading
from veneer.training.merge_files import base_directory, merge_files
from veneer.training.progress import Advance, Silent

DOWN = "model.layers.1.mlp.down_proj"


def base_of(place: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **saving: Any) -> Path:
    tiny_model(seed).to(dtype).save_pretrained(place, **saving)
    tiny_tokenizer().save_pretrained(place)
    return place


def adapter_of(base: Path, place: Path, **options: Any) -> Path:
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    }
    config = LoraConfig(**settings | {"task_type": "CAUSAL_LM"} | options)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(place, save_embedding_layers=False)
    return place


class Counting(Silent):
    """Knows how much of a bar is left."""

    left = -1

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        self.left = total

        def advance(steps: int, note: str) -> None:
            self.left -= steps

        yield advance


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_same_bytes_as_in_memory(dtype: str, shards: int, tmp_path: Path) -> None:
    saving = {} if shards == 1 else {"max_shard_size": "40KB"}
    base = base_of(tmp_path / "base", **saving)
    adapter = adapter_of(base, tmp_path / "adapter")
    progress = Counting()
    report = merge_files(adapter, base, tmp_path / "files", dtype, progress=progress)
    model, tokenizer = load_adapted(adapter, loading=Loading(dtype))
    expected, _ = save_merged(model, tokenizer, tmp_path / "memory")
    for made in ("files", "memory"):
        assert json.loads((tmp_path / made / "config.json").read_text())["rope_theta"] == 10000.0
    assert dict(report.kept) == pytest.approx(dict(expected.kept))
    weights = sorted((tmp_path / "files").glob("*.safetensors"))
    assert len(weights) >= shards and progress.left == 0
    ours = {k: t for file in weights for k, t in load_file(file).items()}
    theirs = load_file(tmp_path / "memory" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        if "embed" in name:  # stored transposed: another order of summation
            assert_close(ours[name], tensor)
        else:
            assert torch.equal(ours[name], tensor), name


def test_the_result_is_a_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_of(tmp_path / "base")
    merge_files(adapter_of(base, tmp_path / "adapter"), base, tmp_path / "out", "float32")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == torch.float32 and not info["missing_keys"] and not info["unexpected_keys"]
    AutoTokenizer.from_pretrained(tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "generation_config.json" in names and not any(name.startswith("adapter") for name in names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "is a dora"),
        ({"modules_to_save": ["lm_head"]}, "tensors besides its factors"),
    ],
)
def test_what_needs_a_model_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    with pytest.raises(MergeError, match=said):
        merge_files(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_and_shapes_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.query.weight"] = weights.pop("model.layers.0.self_attn.q_proj.weight")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(MergeError) as caught:
        merge_files(adapter, base, tmp_path / "out")
    said = str(caught.value)
    assert "layers.0.self_attn.q_proj: the base's files have no such weight" in said
    assert (
        "layers.1.mlp.down_proj: factors (4, 48) and (32, 4)" in said
        and "in memory instead (without low_memory)" in said
    )


def change(adapter: Path, name: str, by: Callable[[torch.Tensor], Any]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["veneer_digest"]  # on purpose, not by accident
    by(tensors[f"base_model.model.{name}"])
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_an_adapter_that_is_not_finite_is_refused(value: float, dtype: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    change(adapter, f"{DOWN}.lora_A.weight", lambda tensor: tensor[0].fill_(value))
    with pytest.raises(AdapterFileError, match=rf"1 of \d+ tensors hold NaN or infinity: .*{DOWN}\.lora_A"):
        merge_files(adapter, base, tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_leaves_the_range_is_refused_with_its_module(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    change(adapter, f"{DOWN}.lora_B.weight", lambda tensor: tensor.mul_(1e7))
    with pytest.raises(MergeError, match=rf"{DOWN}: .*leaves the range of torch\.float16"):
        merge_files(adapter, base, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].to(FP8)}),
            f"{DOWN}: its weight holds 8-bit",
        ),
        (lambda t: t.update({f"{DOWN}.weight_scale_inv": torch.ones(1)}), f"{DOWN}: .* as weight_scale_inv"),
        (lambda t: t.update({"lm_head.weight_scale": torch.ones(1)}), "lm_head: .* as weight_scale"),
        (lambda t: t.update({"other.weight": torch.ones(2, 2).to(FP8)}), "other: its weight holds 8-bit"),
    ],
    ids=["float8", "a scale beside it", "a scale elsewhere", "float8 elsewhere"],
)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_base_stored_as_codes_is_refused(change: Any, said: str, dtype: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(MergeError, match=said):
        merge_files(adapter, base, tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    other = base_of(tmp_path / "other", seed=7)
    with pytest.raises(BaseMismatchError, match="another base model"):
        merge_files(adapter, other, tmp_path / "out")
    assert base_directory(adapter) == base and base_directory(adapter, str(other)) == other


@pytest.mark.parametrize(("name", "size"), [("num_attention_heads", 2), ("num_hidden_layers", 3)])
def test_a_base_of_another_architecture_is_refused(name: str, size: int, tmp_path: Path) -> None:
    """Its weights are those that the adapter was made on, as far as the adapter goes."""
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, name: size}))
    with pytest.raises(BaseMismatchError, match=rf"{name} was {config[name]} and is {size}"):
        merge_files(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_index(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", max_shard_size="40KB")
    adapter = adapter_of(base, tmp_path / "adapter")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MergeError, match="lacks"):
        merge_files(adapter, base, tmp_path / "out")
    (base / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(MergeError, match=r"index\.json is damaged"):
        merge_files(adapter, base, tmp_path / "out")
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(MergeError, match=r"holds neither model\.safetensors nor"):
        merge_files(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    adapter = adapter_of(base_of(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(TrainingError, match=r"no model at .*nowhere': it does not exist"):
        base_directory(adapter, str(tmp_path / "nowhere"))
    with pytest.raises(TrainingError, match="'someone/something' cannot be loaded"):
        base_directory(adapter, "someone/something")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(AdapterFileError, match="does not name its base model"):
        base_directory(adapter)


def in_a_hub_cache(base: Path, place: Path) -> Path:
    """The same files as huggingface_hub lays them out: links to blobs beside the snapshots."""
    snapshot = place / "models--somebody--tiny" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        blob = snapshot.parents[1] / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def names_in(place: Path) -> set[str]:
    return {file.name for file in place.iterdir()}


def test_files_of_unknown_names_are_not_taken_along(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    merge_files(adapter, base, tmp_path / "plain")
    (tmp_path / "secret").write_text("secret")
    for place in (base, adapter):
        (place / "notes.txt").symlink_to(tmp_path / "secret")
        (place / "tokenizer_secrets.txt").write_text("secret")
    for name in ("LICENSE", "modeling_tiny.py", "chat_template.jinja", "vocab.json"):
        (base / name).write_text(name)
    merge_files(adapter, base, tmp_path / "out")
    assert names_in(tmp_path / "out") == names_in(tmp_path / "plain") | {
        "LICENSE",
        "modeling_tiny.py",
        "vocab.json",
    }


def test_links_that_lead_out_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    (tmp_path / "secret").write_text("secret")
    tiny_tokenizer().save_pretrained(adapter)
    for link in (
        adapter / "vocab.json",
        adapter / "additional_chat_templates" / "tool.jinja",
        base / "LICENSE",
    ):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(tmp_path / "secret", link.parent))
    with pytest.raises(MergeError) as refused:
        merge_files(adapter, base, tmp_path / "out")
    for name in ("vocab.json", "tool.jinja", "LICENSE"):
        assert name in str(refused.value)
    assert "leads out of" in str(refused.value) and not (tmp_path / "out").exists()


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    adapter = adapter_of(base, tmp_path / "adapter")
    (base / "inner").mkdir()
    (base / "inner" / "LICENSE").write_text("free")
    (base / "LICENSE").symlink_to("inner/LICENSE")
    merge_files(adapter, base, tmp_path / "plain")
    assert (tmp_path / "plain" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "plain" / "LICENSE").read_text() == "free"
    shutil.rmtree(base / "inner")
    (base / "LICENSE").unlink()
    shutil.rmtree(base / "additional_chat_templates")
    snapshot = in_a_hub_cache(base, tmp_path / "hub")
    merge_files(adapter, snapshot, tmp_path / "out")
    files = [file for file in (tmp_path / "out").iterdir() if file.is_file()]
    assert {file.name for file in files} == names_in(tmp_path / "plain") - {
        "LICENSE",
        "additional_chat_templates",
    }
    for file in files:
        assert not file.is_symlink() and file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes()


@pytest.mark.parametrize("low_memory", [True, False])
def test_all_files_have_the_permissions_of_the_umask(low_memory: bool, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    for file in base.iterdir():
        file.chmod(0o600)
    if low_memory:
        merge_files(adapter, base, tmp_path / "out")
    else:
        save_merged(*load_adapted(adapter), tmp_path / "out")
    (tmp_path / "ordinary").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}
