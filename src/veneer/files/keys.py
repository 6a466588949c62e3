"""Names of tensors in memory and on disk: one table of rules."""

from __future__ import annotations

#: What names on disk begin with: attributes of PeftModel and LoraModel.
PREFIX = "base_model.model."
#: Segments that compilers, shards and checkpoints put into a name.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

FACTORS = ("lora_A", "lora_B")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
TOKENS_DELTA = "trainable_tokens_delta"
SAVED_MODULES = "modules_to_save"


def to_disk(memory_name: str, adapter: str) -> str:
    """The name on disk of a tensor that is called `memory_name` in memory.

    At most one rule applies, looked for from the end of the name, so that a module path may itself hold a
    segment called ``lora_A`` or like the adapter:

    ========================================  ===================================
    in memory                                 on disk
    ========================================  ===================================
    ``P.lora_A.<adapter>.weight``             ``P.lora_A.weight`` (lora_B, and lora_B's bias, too)
    ``P.lora_embedding_A.<adapter>``          ``P.lora_embedding_A`` (and B)
    ``P.lora_magnitude_vector.<adapter>.weight``  ``P.lora_magnitude_vector`` (any other ``lora_…``, too)
    ``P.trainable_tokens_delta.<adapter>``    ``P.trainable_tokens_delta``
    ``P.modules_to_save.<adapter>.R``         ``P.R``
    anything else (``P.base_layer.bias``)     unchanged
    ========================================  ===================================

    Within the tensors of one adapter of one model no two names meet: a module that holds ``lora_A`` or
    ``modules_to_save`` is a wrapper, and what it wraps lies below ``base_layer`` or ``original_module``.

    Args:
        memory_name: dotted name, with whatever prefix the model has.
        adapter: the adapter's name, without dots.
    """
    parts = memory_name.split(".")
    if len(parts) >= 3 and parts[-2] == adapter:
        if parts[-3] in FACTORS and parts[-1] in ("weight", "bias"):
            return ".".join([*parts[:-2], parts[-1]])
        if parts[-3].startswith("lora_") and parts[-1] == "weight":
            return ".".join(parts[:-2])
    if parts[-1] == adapter and parts[-2:-1] and parts[-2] in (*EMBEDDING_FACTORS, MAGNITUDE, TOKENS_DELTA):
        return ".".join(parts[:-1])
    for i in range(len(parts) - 3, -1, -1):
        if parts[i] == SAVED_MODULES and parts[i + 1] == adapter:
            return ".".join(parts[:i] + parts[i + 2 :])
    return memory_name


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
