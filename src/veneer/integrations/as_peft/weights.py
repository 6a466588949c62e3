"""Renaming an adapter's tensors when transformers loads them.

transformers' `load_adapter` loads an adapter as it loads a checkpoint: it renames the keys of the file by a
list of rules, then looks each up in the model's state dict. The rules here are the inverse of the one table
of `veneer.files`, followed by the model's own renamings (of names that a module had in older versions).
"""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import WeightRenaming

from ...files.keys import PREFIX

_WITH_WEIGHT = ("lora_A", "lora_B")
_BARE = ("lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta")


def to_memory(key: str, adapter: str) -> str:
    """The name in a plain model of a tensor that is called `key` in an adapter's file.

    The prefix `base_model.model.` is removed and the adapter's name is inserted. Names without a place for it
    (biases; trained copies of modules, whose renaming needs the model) are not changed.
    """
    key = key.removeprefix(PREFIX)
    parts = key.split(".")
    if len(parts) >= 2 and parts[-2] in _WITH_WEIGHT and parts[-1] in ("weight", "bias"):
        return ".".join([*parts[:-1], adapter, parts[-1]])
    if parts[-1] in _BARE:
        return f"{key}.{adapter}"
    if parts[-1].startswith("lora_"):
        return f"{key}.{adapter}.weight"
    return key


class AdapterRenaming(WeightRenaming):
    """Renames keys of the file to those of the model, for one adapter."""

    __slots__ = ("adapter",)

    def __init__(self, adapter: str) -> None:
        super().__init__(rf"^{PREFIX}", "")
        self.adapter = adapter

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name, and None because the tensor itself is not changed."""
        renamed = to_memory(source_key, self.adapter)
        if renamed == source_key:
            return source_key, None
        self._was_used = True  # type: ignore[misc]
        return renamed, self.source_patterns[0]


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The rules by which transformers renames the keys of an adapter's file.

    Args:
        weight_conversions: The model's own rules. Renamings are kept; conversions that fuse or split the
            tensors of
            the base do not apply to factors and are left out, so that keys they would concern are reported.
        adapter_name: Name that the adapter gets in the model.
        peft_config: Not needed.
    """
    renamings = [rule for rule in weight_conversions or [] if isinstance(rule, WeightRenaming)]
    return [AdapterRenaming(adapter_name), *renamings]
