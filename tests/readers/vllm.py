"""vLLM's rules for an adapter's directory, written down from its sources (0.33).

It reads ``r``, ``lora_alpha`` and ``target_modules`` and fails without them. It refuses DoRA, every kind of
bias, whole modules other than a classifier's head, initialisations that changed the base, repeated layers and
trained tokens. Names end in a factor's; a copy of an embedding's weight is passed over.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from tests.readers.common import Refused, json_of, product, tensors_of

PREFIX = "base_model.model."
ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
}


def read(place: Path, max_lora_rank: int = 512) -> dict[str, Tensor]:
    """Module path -> update as it would be applied, patterns honoured."""
    config = json_of(place / "adapter_config.json")
    problems = [f"no {name}" for name in ("r", "lora_alpha", "target_modules") if name not in config]
    for name in ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices"):
        if config.get(name):
            problems.append(name)
    if config.get("bias", "none") != "none":
        problems.append("bias")
    if any(name not in ("classifier", "score") for name in config.get("modules_to_save") or ()):
        problems.append("modules_to_save")
    if str(config.get("init_lora_weights")).split("_")[0].lower() in ("pissa", "olora", "corda", "loftq"):
        problems.append("init_lora_weights")
    if max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
        raise Refused(f"no --max-lora-rank {max_lora_rank}")
    if config.get("r", 0) > max_lora_rank:
        problems.append("rank above --max-lora-rank")
    if problems:
        raise Refused(", ".join(problems))
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(place / "adapter_model.safetensors").items():
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        if name.startswith(PREFIX) and name.split(".")[-2] in ("classifier", "score"):
            continue
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None or not name.startswith(PREFIX) or tensor.dim() != 2:
            raise Refused(f"unsupported LoRA weight: {name} {tuple(tensor.shape)}")
        modules.setdefault(name[len(PREFIX) : -len(end)], {})[ENDS[end]] = tensor
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        # This release honours them; those before ignore them, so no file should count on it.
        raise Refused("patterns, which not every release reads")
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return {
        path: _update(parts, config["lora_alpha"] / divisor, config["r"]) for path, parts in modules.items()
    }


def _update(parts: dict[str, Tensor], scale: float, r: int) -> Tensor:
    lookup = "embedding_a" in parts
    a, b = (parts.get(f"embedding_{n}" if lookup else n) for n in "ab")
    if a is None or b is None or len(parts) != 2 or a.shape[0] != r or b.shape[1] != r:
        raise Refused(f"factors that are not of rank {r}: {sorted(parts)}")
    whole = product(b, a, scale)
    return whole.T if lookup else whole
