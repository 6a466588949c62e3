"""Weights that accelerate offloads (to CPU memory or disk) and fetches for each call.

Such a module has its parameters on the meta device and an alignment hook that has the values. The hook is
recognised by its attributes, so accelerate need not be imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.backends.base import Backend


def _hook(module: nn.Module) -> Any:
    """The alignment hook of a module whose weights are offloaded, or None."""
    hook = module.__dict__.get("_hf_hook")
    for candidate in getattr(hook, "hooks", (hook,)):
        if getattr(candidate, "offload", False) and getattr(candidate, "weights_map", None) is not None:
            return candidate
    return None


def stored(module: nn.Module, name: str) -> Tensor | None:
    hook = _hook(module)
    return None if hook is None else hook.weights_map[name].detach()


def execution_device(module: nn.Module) -> torch.device | None:
    hook = _hook(module)
    return None if hook is None else torch.device(hook.execution_device)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy with its own values, also if the original's are offloaded."""
    hooks = {id(m): m.__dict__["_hf_hook"] for m in module.modules() if _hook(m) is not None}
    # A hook refers to the values of the whole model, which must not be copied.
    twin = copy.deepcopy(module, {id(hook): None for hook in hooks.values()})
    for old, new in zip(module.modules(), twin.modules(), strict=True):
        if id(old) not in hooks:
            continue
        for name in ("forward", "_hf_hook", "_old_forward"):
            new.__dict__.pop(name, None)
        device = _hook(old).execution_device
        for name, parameter in old._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = _hook(old).weights_map[name].detach().to(device, copy=True)
                new._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in old._buffers.items():
            if buffer is not None and buffer.is_meta:
                new._buffers[name] = _hook(old).weights_map[name].detach().to(device, copy=True)
    return twin


class Offloaded(Backend):
    """The weight lies in the hook's map; a written weight replaces the map's entry in memory."""

    name = "offloaded"
    priority = 10

    def matches(self, module: nn.Module) -> bool:
        return self.holds(module, "weight")

    def holds(self, module: nn.Module, name: str) -> bool:
        """A tensor of any name on the meta device, with a hook that has its values."""
        if _hook(module) is None:
            return False
        tensor = getattr(module, name, None)
        return isinstance(tensor, Tensor) and tensor.is_meta

    def tensor_device(self, module: nn.Module, name: str) -> torch.device:
        return self.device(module)

    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        value: Tensor = _hook(module).weights_map[name]
        return value.detach()

    def write(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> None:
        self.writing(module, tensor, name)()

    def writing(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> Callable[[], None]:
        """A call that replaces the value in the map."""
        weights = _hook(module).weights_map
        # A PrefixedDataset over a dict of tensors, or over a loader that prefers its `state_dict`
        # to the files on disk: the user's offload folder is never rewritten.
        dataset = getattr(weights, "dataset", weights)
        key = f"{getattr(weights, 'prefix', '')}{name}"
        store: MutableMapping[str, Tensor] = getattr(dataset, "state_dict", dataset)
        # In the layout of a saved tensor: the last digit of torch's kernels depends on it.
        value = tensor.detach().to("cpu").contiguous()
        placeholder: nn.Parameter = getattr(module, name)
        if placeholder.shape != tensor.shape:
            placeholder = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)

        def put() -> None:
            store[key] = value
            if getattr(module, name) is not placeholder:
                setattr(module, name, placeholder)

        return put

    def like(self, module: nn.Module, name: str = "weight") -> Tensor:
        tensor: Tensor = getattr(module, name)  # the placeholder: nothing is read from a disk
        return tensor.detach().to("meta")

    def device(self, module: nn.Module) -> torch.device:
        return torch.device(_hook(module).execution_device)

    def dtype(self, module: nn.Module) -> torch.dtype:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.dtype
