"""Adapters as state dicts, under the names that they have on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from veneer import state
from veneer.checkpoint import (
    open_adapter,
)
from veneer.doors import adapter_directory
from veneer.errors import (
    CheckpointError,
    VeneerWarning,
)
from veneer.model.persistence import check_save_embedding_layers, renamer


class LoadResult(NamedTuple):
    """Keys that did not find their counterpart, with torch's names for them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter under their names on disk.

    Args:
        model: A PeftModel, or a module with injected adapters.
        state_dict: Take the values from this full state dict.
        adapter_name: The adapter.
        unwrap_compiled: Accepted for the field's sake: a compiled model is always unwrapped.
        save_embedding_layers: See `PeftModel.save_pretrained`.
    """
    check_save_embedding_layers(save_embedding_layers)
    inner = getattr(model, "_orig_mod", model)
    return state.adapter_state_dict(
        inner, adapter_name, state_dict=state_dict, save_embedding_layers=save_embedding_layers
    )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Write tensors with names on disk into an adapter that the model has.

    Returns:
        The keys that were missing or unexpected; each kind is warned of too.

    Raises:
        LoadMismatchError: If no tensor fits, or shapes differ. Nothing has been written then.
        CheckpointError: If it is no mapping of names to tensors.
    """
    if not isinstance(peft_model_state_dict, Mapping):
        raise CheckpointError(
            "peft_model_state_dict: a mapping of names to tensors is needed, got "
            f"{type(peft_model_state_dict).__name__}"
        )
    report = state.set_adapter_state_dict(
        model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes=ignore_mismatched_sizes
    )
    if not report.ok:
        warnings.warn(report.message("the state dict"), VeneerWarning, stacklevel=2)
    return LoadResult(list(report.missing), list(report.unexpected))


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Read the tensors of a saved adapter, local or on the hub, under their names on disk.

    Args:
        model_id: A directory or a repository id.
        device: Where to put them; the CPU by default.
        key_mapping: Regular expressions to replacements, applied to the names.
        **hf_hub_download_kwargs: ``subfolder``, ``revision``, ``token`` and the like.
    """
    file = open_adapter(adapter_directory(model_id, **hf_hub_download_kwargs))
    rename = renamer(key_mapping)
    return {rename(name): tensor for name, tensor in file.tensors(device=device or "cpu").items()}
