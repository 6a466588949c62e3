"""How the base weight of a layer is stored: one file per storage."""

from __future__ import annotations

from torch import Tensor, nn

from veneer.backends.base import Backend, find, geometry, gives_fresh_output, serving
from veneer.backends.offloaded import copied, stored
from veneer.backends.scaled import FileCodes, holds_codes, is_float8
from veneer.registry import load_all

load_all(__name__, __path__)


def stored_elsewhere(model: nn.Module) -> dict[int, Tensor]:
    """The values of offloaded parameters, by the id of their placeholder on the meta device."""
    found = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = stored(module, name)
                if value is not None:
                    found[id(parameter)] = value
    return found


def quantised(module: nn.Module) -> Backend | None:
    """The backend of a module whose weight is stored as codes of a few bits; None for any other module."""
    possible = serving(type(module))
    return next((b for b in possible if b.quantization is not None and b.matches(module)), None)


def prepare_backward(model: nn.Module) -> None:
    """Prepare all modules of a model for gradients to pass through them. No value changes."""
    for module in model.modules():
        if (backend := quantised(module)) is not None:
            backend.prepare_backward(module)


__all__ = [
    "Backend",
    "FileCodes",
    "copied",
    "find",
    "geometry",
    "gives_fresh_output",
    "holds_codes",
    "is_float8",
    "quantised",
    "prepare_backward",
    "stored_elsewhere",
]
