"""Adapters as state dicts, under the names that they have on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from veneer import state
from veneer.adapters import base_names, base_of, walk
from veneer.doors import adapter_directory
from veneer.errors import (
    CheckpointError,
    LoadMismatchError,
    MergeError,
    VeneerWarning,
)
from veneer.files.read import open_adapter
from veneer.layers import LoraLayer
from veneer.model.persistence import check_save_embedding_layers, renamed, renamer
from veneer.wording import some


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
    *,
    check_finite: bool = True,
) -> LoadResult:
    """Write tensors with names on disk into an adapter that the model has.

    NaN and infinity are refused, unless ``check_finite=False``, which warns.

    Returns:
        The keys that were missing or unexpected; each kind is warned of too.

    Raises:
        LoadMismatchError: If no tensor fits, or shapes differ. Nothing has been written then.
        AdapterFileError: If a tensor holds NaN or infinity, or a factor is no floating-point number.
        CheckpointError: If it is no mapping of names to tensors.
    """
    if not isinstance(peft_model_state_dict, Mapping):
        raise CheckpointError(
            "peft_model_state_dict: a mapping of names to tensors is needed, got "
            f"{type(peft_model_state_dict).__name__}"
        )
    report = state.set_adapter_state_dict(
        model,
        peft_model_state_dict,
        adapter_name,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        check_finite=check_finite,
    )
    if not report.ok:
        warnings.warn(report.message("the state dict"), VeneerWarning, stacklevel=2)
    return LoadResult(list(report.missing), list(report.unexpected))


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's state dict under the names that it has without adapters.

    While adapters are merged, it holds the weights as they were before.

    Args:
        model: A PeftModel, or a module with injected adapters.
    """
    base = base_of(model)
    tensors = base.state_dict()
    found = {}
    for plain, (name, holder, attribute) in base_names(base).items():
        if isinstance(holder, LoraLayer) and holder.merged:
            found[plain] = getattr(holder.original_base(), attribute).detach()
        elif name in tensors:
            found[plain] = tensors[name]
    return found


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Write a base model's state dict, with the names it has without adapters, into an adapted model.

    Args:
        model: A PeftModel, or a module with injected adapters.
        state_dict: Tensors by their name.
        strict: Raise for names that are missing or unexpected, before anything is written.

    Returns:
        The names that were missing or unexpected.

    Raises:
        LoadMismatchError: Names do not fit, and ``strict``; or shapes differ. Nothing has been written then.
        MergeError: An adapter is merged into the weights.
    """
    base = base_of(model)
    merged = [p for p, m in walk(base) if isinstance(m, LoraLayer) and m.merged]
    if merged:
        raise MergeError(f"adapters are merged into {merged[0]} and {len(merged) - 1} more: unmerge first")
    own = base.state_dict()
    names = {plain: place.name for plain, place in base_names(base).items() if place.name in own}
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unexpected]
    wrong = wrong if strict else []
    for name, tensor in state_dict.items():
        if name in names and own[names[name]].shape != tensor.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, here {tuple(own[names[name]].shape)}")
    if wrong:
        raise LoadMismatchError(f"the base's state dict does not fit: {'; '.join(some(wrong, 6))}")
    base.load_state_dict({names[n]: t for n, t in state_dict.items() if n in names}, strict=False)
    return LoadResult(missing, unexpected)


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
    names = renamed(file.shapes, renamer(key_mapping))
    tensors = file.tensors(device=device or "cpu")
    return {new: tensors[name] for new, name in names.items()}
