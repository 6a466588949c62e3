"""Tensors of the base that an adapter may train or carry along: biases and embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from veneer.adapters import AdapterModule
from veneer.layers import LoraLayer
from veneer.layers.modules_to_save import ModulesToSaveWrapper


def bias_parameters(
    model: nn.Module,
    kind: str,
    adapter: str,
    future: Iterable[str] = (),
    copied: Iterable[str] = (),
) -> Iterator[tuple[str, nn.Parameter]]:
    """The base biases that an adapter with ``bias=kind`` trains, by their name on disk (without prefix).

    The names depend on what this adapter adapts, not on what other adapters of the model do.

    Args:
        model: The model.
        kind: "none", "lora_only" (biases of the layers that the adapter adapts) or "all".
        adapter: The adapter's name.
        future: Paths of layers that it is about to adapt.
        copied: Paths of modules that it is about to train whole.
    """
    if kind == "none":
        return
    own = {
        p: m for p, m in model.named_modules() if isinstance(m, AdapterModule) and adapter in m.held_adapters
    }
    adapted = {path for path, m in own.items() if isinstance(m, LoraLayer)} | set(future)
    whole = {path for path, m in own.items() if isinstance(m, ModulesToSaveWrapper)} | set(copied)
    roots = tuple(f"{path}." for path in whole)
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if last != "bias" or ".lora_" in f".{path}" or ".modules_to_save." in f".{name}":
            continue
        path = path.removesuffix(".base_layer").replace(".original_module", "")
        if f"{path}.".startswith(roots):
            continue  # the adapter trains its own copy
        if path in adapted:
            yield f"{path}.base_layer.bias", parameter
        elif kind == "all":
            yield f"{path}.bias" if path else "bias", parameter


def embedding_weights(
    model: nn.Module, future: Mapping[str, LoraLayer] | None = None
) -> dict[str, nn.Parameter]:
    """Input and output embedding weights by their name on disk (without prefix); empty for other models."""
    result: dict[str, nn.Parameter] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        call = getattr(model, getter, None)
        try:
            module = call() if callable(call) else None
        except (NotImplementedError, AttributeError):
            module = None
        if module is None:
            continue
        path = next((p for p, m in model.named_modules() if m is module), None)
        if path is None or isinstance(module, ModulesToSaveWrapper):
            continue
        if isinstance(module, LoraLayer):
            module, path = module.base_layer, f"{path}.base_layer"
        elif path in (future or {}):
            path = f"{path}.base_layer"
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            result[f"{path}.weight"] = weight
    return result
