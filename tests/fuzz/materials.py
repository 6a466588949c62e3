"""Good inputs, made once: what is spoiled, and what stays as it is beside it."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.laws.expert_layouts import MIXTURES
from tests.laws.test_expert_layouts import written
from tests.unit.training.tiny import RECORDS, saved_records, saved_tiny, tiny_model, tiny_tokenizer
from veneer import Family, LoraConfig, get_peft_model
from veneer.expert_layouts.layouts import LAYOUTS
from veneer.files.layout import SAFETENSORS_NAME
from veneer.files.write import write_adapter


def make(root: Path) -> None:
    """Make all of them, each in a directory of its name below another."""
    saved_tiny(root / "base")
    _adapter(root, "adapter")
    tiny_tokenizer().save_pretrained(root / "adapter")
    _adapter(root, "second", seed=2)
    _adapter(root, "bin", safe_serialization=False)
    _adapter(root, "special", use_dora=True, rank_pattern={"q_proj": 3}, modules_to_save=["lm_head"],
             target_modules=["q_proj", "down_proj", "embed_tokens"])  # fmt: skip
    shutil.copytree(root / "adapter", root / "of others")
    file = root / "of others" / SAFETENSORS_NAME
    save_file(load_file(file), file, metadata={"format": "pt"})
    kohya(root / "kohya")
    (root / "archive").mkdir()
    with tarfile.open(root / "archive" / "run.tar", "w") as made:
        for name in ("adapter_config.json", SAFETENSORS_NAME):
            made.add(root / "adapter" / name, name)
    _experts(root / "experts")
    _family(root / "state")
    _data(root / "data")
    _yaml(root)


def adapted(seed: int = 1, **options: Any) -> Any:
    """The tiny model with an adapter that changes something."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(tiny_model(), LoraConfig(**{**config, **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.1)
    return model


def _adapter(root: Path, name: str, seed: int = 1, safe_serialization: bool = True, **options: Any) -> None:
    model = adapted(seed, **options)
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    model.save_pretrained(root / name, safe_serialization=safe_serialization, save_embedding_layers=False)


def kohya(place: Path, seed: int = 0) -> None:
    """A file as sd-scripts writes it."""
    place.mkdir()
    torch.manual_seed(seed)
    tensors = {}
    for number in range(2):
        path = f"lora_unet_down_blocks_{number}_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors |= {
            f"{path}.lora_down.weight": torch.randn(2, 6),
            f"{path}.lora_up.weight": torch.randn(6, 2),
            f"{path}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, place / "lora.safetensors", metadata={"ss_network_module": "networks.lora"})


def _experts(place: Path) -> None:
    """An adapter of a mixture's experts, in one of the layouts that are told by their names."""
    layout, mixture = LAYOUTS["transformers-4"], MIXTURES["qwen3_moe"]
    made = written(layout, "plain", mixture)
    write_adapter(place, made.tensors, {**made.config.to_json(), "base_model_name_or_path": "Qwen3-MoE"})


def _family(place: Path) -> None:
    """Two adapters with the state of their optimizers."""
    family = Family(tiny_model())
    for name in ("a", "b"):
        family.add(name, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    family.save_state(place)
    torch.save({"model.layers.0.self_attn.q_proj": torch.ones(2, 2)}, place / "cache.pt")


def _data(place: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    place.mkdir()
    saved_records(place / "data.jsonl")
    (place / "data.json").write_text(json.dumps(RECORDS))
    for suffix, sign in (("csv", ","), ("tsv", "\t")):
        lines = [f"prompt{sign}completion", *(f"{r['prompt']}{sign}{r['completion']}" for r in RECORDS)]
        (place / f"data.{suffix}").write_text("\n".join(lines))
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), place / "data.parquet")


def _yaml(root: Path) -> None:
    import yaml

    place = root / "yaml"
    place.mkdir()
    run = {
        "model": str(root / "base"),
        "data": str(root / "data/data.jsonl"),
        "output": "made",
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "down_proj"],
        "learning_rate": 1e-3,
        "max_steps": 1,
        "batch_size": 4,
        "columns": {"prompt": "prompt"},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    swept = {**run, "validation_split": 0.2, "grid": {"learning_rate": [1e-3, 1e-2], "lora_alpha": [4, 8]}}
    del swept["learning_rate"]
    (place / "sweep.yaml").write_text(yaml.safe_dump(swept))
