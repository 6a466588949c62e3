"""By default, how EVA runs a model and which rows of a layer's input it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import EvaConfig, LoraConfig
from veneer.errors import ConfigError


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """``model(**inputs)``."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """The positions (n, 2) of tokens that count: not padding, and not masked in the labels.

    Raises:
        ConfigError: If the batch is no dictionary.
    """
    if not isinstance(model_input, Mapping):
        raise ConfigError(
            f"the batches of a language model are dictionaries, got {type(model_input).__name__}: pass "
            "prepare_model_inputs_fn=None and prepare_layer_inputs_fn=None to look at every row"
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    counts: Tensor = mask.bool()
    options = peft_config.eva_config or EvaConfig()
    if options.use_label_mask and "labels" in model_input:
        counts = counts & (model_input["labels"] != options.label_mask_value)
    return counts.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """The rows (n, in) of a layer's input (batch, length, in) at the positions that count."""
    rows: Tensor = first_tensor(layer_input, layer_name)[model_input.T.unbind()]
    return rows


def first_tensor(layer_input: Any, layer_name: str) -> Tensor:
    """A layer's input, from the arguments that a hook receives.

    Raises:
        ConfigError: If there is none.
    """
    if isinstance(layer_input, Sequence) and layer_input:
        layer_input = layer_input[0]
    if not isinstance(layer_input, Tensor):
        raise ConfigError(f"{layer_name} was called without a tensor: pass a prepare_layer_inputs_fn for it")
    return layer_input


def moved(inputs: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: moved(value, device) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(moved(value, device) for value in inputs)
    return inputs


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    world = torch.distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    torch.distributed.all_gather(sizes, torch.tensor([rows.shape[0]], device=rows.device))
    padded = rows.new_zeros(max(int(n) for n in sizes), rows.shape[1])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])
