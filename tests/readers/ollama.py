"""Ollama's conversion of a safetensors adapter, from its sources: Llama's and Gemma 2's layers only.

``lora_alpha`` is an unsigned whole number. Names are rewritten by replacement, and must become those of
blocks; a factor is turned round where its longer side is not where it should be.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from tests.readers.common import Refused, json_of, product, tensors_of

REPLACEMENTS = (
    ("base_model.model.", ""),
    ("model.layers", "blk"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.up_proj", "ffn_up"),
    ("lora_A.weight", "weight.lora_a"),
    ("lora_B.weight", "weight.lora_b"),
)
BLOCK = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|down|up))\.weight\.lora_[ab]")


def read(place: Path) -> dict[str, Tensor]:
    """Module path (as in the source) -> update."""
    config = json_of(place / "adapter_config.json")
    alpha = config["lora_alpha"]
    if type(alpha) is not int or alpha < 1:
        raise Refused(f"lora_alpha {alpha!r} is no unsigned whole number")
    if silent := [n for n in ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora") if config.get(n)]:
        raise Refused(f"ignored in silence: {', '.join(silent)}")
    parts: dict[str, Tensor] = {}
    paths = {}
    for name, tensor in tensors_of(place / "adapter_model.safetensors").items():
        new = name
        for old, instead in REPLACEMENTS:
            new = new.replace(old, instead)
        if not BLOCK.fullmatch(new) or tensor.dim() != 2:
            raise Refused(f"{name} becomes {new}, which no model has")
        rows, columns = tensor.shape
        turned = rows > columns if new.endswith("lora_a") else rows < columns
        parts[new] = tensor.T if turned else tensor
        paths[new.rpartition(".")[0]] = re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name)
    return {
        path: product(parts[f"{new}.lora_b"], parts[f"{new}.lora_a"], alpha / parts[f"{new}.lora_b"].shape[1])
        for new, path in paths.items()
    }
