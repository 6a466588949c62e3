"""PEFT's format as its first readers knew it: r, lora_alpha, factors, whole modules, biases."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tests.readers.common import Refused, json_of, product, tensors_of

KNOWN = frozenset(
    """
    peft_type task_type auto_mapping base_model_name_or_path revision inference_mode r lora_alpha lora_dropout
    target_modules fan_in_fan_out bias modules_to_save init_lora_weights layers_to_transform layers_pattern
    """.split()
)
PREFIX = "base_model.model."


def read(place: Path) -> dict[str, Tensor]:
    """Module path -> update."""
    config = json_of(place / "adapter_config.json")
    later = {name for name, value in config.items() if value and name not in KNOWN}
    if later - {"peft_version"} or type(config["lora_alpha"]) is not int:
        raise Refused(f"not plain: {sorted(later)}, lora_alpha = {config['lora_alpha']!r}")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(place / "adapter_model.safetensors").items():
        if ".lora_" not in name:
            continue
        path, _, role = name.removeprefix(PREFIX).rpartition(".lora_")
        if role not in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
            raise Refused(name)
        modules.setdefault(path, {})[role] = tensor
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for path, parts in modules.items():
        lookup = "embedding_A" in parts
        a, b = (parts[f"embedding_{n}"] if lookup else parts[f"{n}.weight"] for n in "AB")
        if a.shape[0] != config["r"]:
            raise Refused(f"{path} has rank {a.shape[0]}")
        found[path] = product(b, a, scale).T if lookup else product(b, a, scale)
    return found


def others(place: Path) -> dict[str, Tensor]:
    """The tensors beside the factors."""
    tensors = tensors_of(place / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if ".lora_" not in name}
