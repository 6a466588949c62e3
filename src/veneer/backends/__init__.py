"""How the base weight of a layer is stored: one file a storage."""

from __future__ import annotations

from torch import Tensor, nn

from veneer.backends.base import Backend, find
from veneer.backends.offloaded import copied, stored
from veneer.registry import load_all

load_all(__name__, __path__)


def stored_elsewhere(model: nn.Module) -> dict[int, Tensor]:
    """Values of the parameters that are on the meta device and kept elsewhere, by the placeholder's id."""
    found = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = stored(module, name)
                if value is not None:
                    found[id(parameter)] = value
    return found


__all__ = ["Backend", "copied", "find", "stored_elsewhere"]
