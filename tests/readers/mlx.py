"""mlx-lm's ``load_adapters``, from its sources (0.32), on a base given as the shapes of its modules.

Modules whose path is among ``lora_parameters.keys`` become LoRA (or DoRA) layers of one rank and scale. Then
every tensor of ``adapters.safetensors`` must be a parameter ``lora_a``, ``lora_b`` or ``m`` of one. A model
whose head is its embedding has no ``lm_head`` there, and applies the embedding's update to its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.readers.common import Refused, json_of, tensors_of


def read(
    place: Path, linears: Mapping[str, Tensor], embeddings: Mapping[str, Tensor] = {}
) -> dict[str, Tensor]:
    """Module path -> the change of its weight (out, in), or (vocabulary, dim).

    Args:
        place: Directory of the adapter.
        linears: The base's linear layers by path, their weights (out, in).
        embeddings: The base's embeddings by path, their weights.
    """
    config = json_of(place / "adapter_config.json")
    given = config["lora_parameters"]
    rank, scale, dora = given["rank"], given["scale"], config.get("fine_tune_type", "lora") == "dora"
    given["dropout"], config["num_layers"]
    weights = {**linears, **embeddings}
    allowed: dict[str, tuple[int, ...]] = {}
    for path in given["keys"]:
        if path not in weights:
            continue  # it becomes nothing, and its tensors are strangers below
        rows, columns = weights[path].shape
        size_in, size_out = (rows, columns) if path in embeddings else (columns, rows)
        allowed |= {f"{path}.lora_a": (size_in, rank), f"{path}.lora_b": (rank, size_out)}
        if dora:
            allowed[f"{path}.m"] = (size_out,)
    tensors = tensors_of(place / "adapters.safetensors")
    for name, tensor in tensors.items():
        if name not in allowed:
            raise Refused(f"{name}: not an adapter parameter in the model")
        if tuple(tensor.shape) != allowed[name]:
            raise Refused(f"{name}: adapter shape {tuple(tensor.shape)} does not match {allowed[name]}")
    if missing := allowed.keys() - tensors.keys():
        raise Refused(f"left at random: {sorted(missing)}")
    changes = {}
    for path in given["keys"]:
        a, b = tensors[f"{path}.lora_a"].double(), tensors[f"{path}.lora_b"].double()
        if path in embeddings:
            changes[path] = scale * (a @ b)
            continue
        delta = scale * (b.T @ a.T)
        if dora:
            weight = weights[path].double()
            adapted = weight + delta
            norms = torch.linalg.vector_norm(adapted, dim=1)
            changes[path] = (tensors[f"{path}.m"].double() / norms)[:, None] * adapted - weight
        else:
            changes[path] = delta
    return changes
