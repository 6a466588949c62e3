"""The strength of each adapter of a layer."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class Strengths(dict[str, float]):
    """``s`` by adapter name: numbers that may be written, each with a tensor of the same value.

    Compilers read the tensors, which are inputs of a graph, while a number would be a constant.
    """

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.update(*args, **kwargs)

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        tensors = self.__dict__.setdefault("tensors", {})  # unpickling fills it before it has attributes
        # A tensor from inference mode cannot be used in a graph outside of it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            tensors[name] = torch.tensor(float(value), dtype=torch.float32, device=self.device)

    def with_one(self, name: str, value: float, device: torch.device) -> Strengths:
        """A new strength for factors on that device, with all others if their tensors must move."""
        moved = device.type != "meta" and device != self.device
        made = Strengths()
        made.device = device if moved else self.device
        made.update({**self, name: value} if moved else {name: value})
        return made

    def take_over(self, others: Strengths) -> None:
        """Take over the numbers and tensors of others, without creating a tensor."""
        dict.update(self, others)
        self.tensors.update(others.tensors)
        self.device = others.device

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.tensors[name]

    update = MutableMapping.update
    setdefault = MutableMapping.setdefault

    def pop(self, name: str, *default: Any) -> Any:
        self.tensors.pop(name, None)
        return super().pop(name, *default)

    popitem = MutableMapping.popitem
    clear = MutableMapping.clear

    def __ior__(self, other: Any) -> Strengths:  # type: ignore[override, misc]
        self.update(other)
        return self

    def move(self, device: torch.device) -> None:
        """Move the tensors to the device of the factors; those of factors without values stay."""
        if device.type != "meta" and device != self.device:
            self.device = device
            self.update(dict(self))
