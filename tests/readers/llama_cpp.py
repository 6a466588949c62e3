"""llama.cpp's ``convert_lora_to_gguf.py`` and what its runtime makes of the result, from its sources.

Names are looked through for ``.lora_A.weight``, ``.lora_B.weight``, ``.lora_embedding_A`` and
``.lora_embedding_B``. ``.base_layer.weight`` is passed over, norms are kept, anything else stops it. Of the
configuration it reads ``lora_alpha``, written as 32 bits, and the base; rsLoRA, the patterns and every other
option are ignored. The runtime scales by alpha over the rank of each pair, ignores norms, and aborts on the
update of an embedding that is the output's weight too.
"""

from __future__ import annotations

import struct
from pathlib import Path

from torch import Tensor

from tests.readers.common import Refused, json_of, product, tensors_of

#: Options that change the result, ignored without a word.
IGNORED = ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters")


def read(place: Path, tied: bool = False) -> dict[str, Tensor]:
    """Module path -> update as it would be applied to a base whose head is, or is not, its embedding."""
    config = json_of(place / "adapter_config.json")
    if silent := [name for name in IGNORED if config.get(name)]:
        raise Refused(f"ignored in silence: {', '.join(silent)}")
    (alpha,) = struct.unpack("<f", struct.pack("<f", config["lora_alpha"]))
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(place / "adapter_model.safetensors").items():
        base = name.replace("base_model.model.", "")
        for part in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
            base = base.replace(part, ".weight")
        is_a = ".lora_A.weight" in name or ".lora_embedding_A" in name
        is_b = ".lora_B.weight" in name or ".lora_embedding_B" in name
        if not is_a and not is_b:
            if ".base_layer.weight" in name:
                continue
            if "_layernorm" in name or ".norm" in name:
                raise Refused(f"ignored in silence: {name}")
            raise Refused(f"Unexpected name '{name}': Not a lora_A or lora_B tensor")
        if base == "lm_head.weight" and tied:
            raise Refused("lm_head is present in adapter, but is ignored in base model")
        if ".lora_embedding_" in name and tied:
            raise Refused("GGML_ASSERT(ggml_can_mul_mat(a, b))")
        role = ("A" if is_a else "B") + ("e" if "embedding" in name else "")
        pairs.setdefault(base.removesuffix(".weight"), {})[role] = tensor
    updates = {}
    for path, parts in pairs.items():
        lookup = "Ae" in parts
        a, b = parts.get("Ae" if lookup else "A"), parts.get("Be" if lookup else "B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[-2] != b.shape[-1]:
            raise Refused(f"{path}: factors {sorted(parts)} make no LoraTorchTensor")
        whole = product(b, a, alpha / b.shape[1])
        updates[path] = whole.T if lookup else whole
    return updates
