"""Tensors of the base that an adapter may train or carry along: biases and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from veneer import backends
from veneer.adapters import AdapterModule, walk
from veneer.layers import LoraLayer
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.trainable_tokens import TrainableTokens
from veneer.sharded import gathered


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
    inside = list(walk(model))
    own = {p: m for p, m in inside if isinstance(m, AdapterModule) and adapter in m.held_adapters}
    adapted = {path for path, m in own.items() if isinstance(m, LoraLayer)} | set(future)
    whole = {path for path, m in own.items() if isinstance(m, ModulesToSaveWrapper)} | set(copied)
    roots = tuple(f"{path}." for path in whole)
    seen: set[nn.Parameter] = set()
    for path, module in inside:
        parameter = module._parameters.get("bias")
        if parameter is None or parameter in seen:
            continue
        seen.add(parameter)
        path = path.removesuffix(".base_layer").replace(".original_module", "")
        if f"{path}.".startswith(roots):
            continue  # the adapter trains its own copy
        if path in adapted:
            yield f"{path}.base_layer.bias", parameter
        elif kind == "all":
            yield f"{path}.bias" if path else "bias", parameter


def base_of(module: nn.Module) -> nn.Module:
    """The module that the model was built with, which an adapter module may stand for now."""
    if isinstance(module, LoraLayer | TrainableTokens):
        return module.get_base_layer()
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def embedding_of(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """The input embedding or output head of a transformers model; None where the model does not name it."""
    getter = getattr(model, f"get_{side}_embeddings", None)
    try:
        module = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # models that have none
        return None
    return module if isinstance(module, nn.Module) else None


def embedding_weights(model: nn.Module, future: Mapping[str, str] | None = None) -> dict[str, nn.Parameter]:
    """Input and output embedding weights by their name on disk (without prefix); empty for other models.

    Args:
        model: The model.
        future: Paths that are about to be wrapped, with where the module itself will lie in the wrapper.
    """
    result: dict[str, nn.Parameter] = {}
    for module in (embedding_of(model, "input"), embedding_of(model, "output")):
        if module is None:
            continue
        path = next((p for p, m in walk(model) if m is module), None)
        if path is None or isinstance(module, ModulesToSaveWrapper):
            continue
        inside = (future or {}).get(path, "")
        if isinstance(module, LoraLayer):
            inside = "base_layer"
        elif isinstance(module, TrainableTokens):
            inside = "token_adapter.base_layer"
        weight = getattr(base_of(module), "weight", None)
        if isinstance(weight, nn.Parameter):
            result[".".join(filter(None, (path, inside, "weight")))] = weight
    return result


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module, str]:
    """The module at a base tensor's name on disk, the base module in it, and the tensor's own name."""
    path, _, last = name.rpartition(".")
    path = path.removesuffix(".base_layer").removesuffix(".token_adapter")
    module = model.get_submodule(path)
    return module, base_of(module), last


def _is_merged(module: nn.Module) -> TypeGuard[LoraLayer | TrainableTokens]:
    return isinstance(module, LoraLayer | TrainableTokens) and module.merged


def merged_over(model: nn.Module, name: str) -> bool:
    return _is_merged(_owner(model, name)[0])


def differs_from_base(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether ``value`` differs from the base tensor of that name on disk, as it is without merged adapters.

    A base on the meta device has no values to differ from.
    """
    module, base, last = _owner(model, name)
    backend = backends.find(base)
    here = module.original_base()._parameters[last] if _is_merged(module) else backend.read(base, last)
    if here is None or here.is_meta:
        return False
    return not torch.equal(gathered(here.detach()).cpu(), value.to(here.dtype).cpu())


def writing_base_tensor(model: nn.Module, name: str, value: Tensor) -> Callable[[], None] | None:
    """A call that gives a base tensor another value, wherever it is stored; None where it has that value."""
    if not differs_from_base(model, name, value):
        return None
    _, base, last = _owner(model, name)
    return backends.find(base).writing(base, value, last)
