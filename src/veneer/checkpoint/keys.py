"""Names: of adapters, and of their tensors in memory and on disk (one table of rules)."""

from __future__ import annotations

import torch

from ..errors import AdapterNameError

FACTORS = ("lora_A", "lora_B")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
TOKENS_DELTA = "trainable_tokens_delta"
SAVED_MODULES = "modules_to_save"
RESERVED_NAMES = ("__base__",)


def to_disk(memory_name: str, adapter: str) -> str:
    """The name on disk of a tensor that is called `memory_name` in memory.

    At most one rule applies, looked for from the end of the name, so that a module path may itself hold a
    segment called ``lora_A`` or like the adapter:

    ========================================  ===================================
    in memory                                 on disk
    ========================================  ===================================
    ``P.lora_A.<adapter>.weight``             ``P.lora_A.weight`` (lora_B, and lora_B's bias, too)
    ``P.lora_embedding_A.<adapter>``          ``P.lora_embedding_A`` (and B)
    ``P.lora_magnitude_vector.<adapter>.weight``  ``P.lora_magnitude_vector``
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
        if parts[-3] == MAGNITUDE and parts[-1] == "weight":
            return ".".join(parts[:-2])
    if parts[-1] == adapter and parts[-2:-1] and parts[-2] in (*EMBEDDING_FACTORS, MAGNITUDE, TOKENS_DELTA):
        return ".".join(parts[:-1])
    for i in range(len(parts) - 3, -1, -1):
        if parts[i] == SAVED_MODULES and parts[i + 1] == adapter:
            return ".".join(parts[:i] + parts[i + 2 :])
    return memory_name


def check_adapter_name(name: object) -> None:
    """Check that `name` can be a module name, a directory name, and part of a tensor's name.

    Raises:
        AdapterNameError: with the reason; names from files and from users alike.
    """
    if not isinstance(name, str):
        raise AdapterNameError(f"an adapter name is a string, not {type(name).__name__}")
    problem = _name_problem(name)
    if problem:
        raise AdapterNameError(f"{name[:80]!r} cannot be the name of an adapter: {problem}")


def _name_problem(name: str) -> str | None:
    if not name.strip():
        return "it is empty"
    if name != name.strip():
        return "it begins or ends with a space"
    if "/" in name or "\\" in name:
        return "it contains a path separator, and an adapter is saved in a sub-directory of its name"
    if "." in name:
        return "it contains a dot, which separates modules in the names of parameters"
    if any(not ch.isprintable() for ch in name):
        return "it contains a control character"
    if len(name.encode("utf-8", "surrogatepass")) > 200:
        return "it is longer than 200 bytes"
    if name in RESERVED_NAMES:
        return "it is reserved for rows that use no adapter"
    if hasattr(torch.nn.ModuleDict, name) or name in ("training",):
        return "torch.nn.ModuleDict has an attribute of that name"
    return None
