"""Weights that consist of codes and a separate scale: FP8 and its relatives.

transformers' `FP8Linear` and the layers of compressed-tensors derive from `torch.nn.Linear` and have a weight
of a floating type, so they look dense. Only their own forward uses the codes; nothing here reads or writes
them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.backends.base import type_names
from veneer.backends.delegated import WITHOUT_READING, Delegated
from veneer.backends.offloaded import execution_device, stored
from veneer.errors import TargetError

#: A factor of embeddings' rows, which is no scale of a quantisation.
_NO_CODE = "embed_scale"


def is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def scale_of(name: str, names: Collection[str]) -> str | None:
    """The name of the scale that belongs to a tensor of a module, or None.

    Args:
        name: The tensor's name on its module.
        names: Names of all tensors of that module.
    """
    scales = [n for n in names if "scale" in n.lower() and n not in (name, _NO_CODE)]
    if not scales:
        return None
    others = tuple(n for n in names if n not in scales and n != name)
    own = [n for n in scales if n.startswith(name)]
    if name == "weight" and not own:
        own = [n for n in scales if not n.startswith(others)]
    return own[0] if own else None


class FileCodes:
    """Tells which tensors in the files of a model are codes.

    Args:
        names: All names of the model's files.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._beside: dict[str, list[str]] = {}
        for name in names:
            path, _, own = name.rpartition(".")
            self._beside.setdefault(path, []).append(own)

    def why(self, name: str, float8: bool) -> str | None:
        """Why the tensor of that name is known to be codes, or None.

        Args:
            name: Its name in the file.
            float8: Whether it is of a floating type of 8 bits or fewer.
        """
        path, _, own = name.rpartition(".")
        if scale := scale_of(own, self._beside.get(path, ())):
            return f"its {own} holds codes, whose scale is stored beside them as {scale}"
        return f"its {own} holds 8-bit floats, which are codes" if float8 else None


class _Codes(Delegated):
    """Base of the storages in this file."""

    # Above the offloaded: offloaded weights may be codes too.
    priority = 12

    def serves(self, kind: type) -> bool:
        return True

    def matches(self, module: nn.Module) -> bool:
        return self.holds(module, "weight")

    def device(self, module: nn.Module) -> torch.device:
        return execution_device(module) or super().device(module)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The type of its first tensor of a wider floating type."""
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        wide = (t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1)
        return next(wide, torch.get_default_dtype())

    def tensor_device(self, module: nn.Module, name: str) -> torch.device:
        return self.device(module)

    def tensor_dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return self.dtype(module)

    def like(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The shape of the codes; for packed codes, the shape of a linear weight."""
        shape = getattr(module, name).shape
        if name == "weight" and isinstance(module, nn.Linear):
            shape = tuple(reversed(self.features(module)))
        return torch.empty(shape, dtype=self.dtype(module), device="meta")

    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The bias as it is.

        Raises:
            TargetError: For codes.
        """
        if not self.holds(module, name):
            value = stored(module, name)
            tensor: Tensor = getattr(module, name) if value is None else value
            return tensor.detach()
        raise TargetError(
            f"the {name} of a {type(module).__name__} is stored as codes ({self.quantization}), which can be "
            "computed with, not read: ",
            WITHOUT_READING,
        )

    def refuses_merge(self, module: nn.Module) -> str:
        return self._refusal(module, "weight")

    def refuses_to_write(self, module: nn.Module, name: str) -> str | None:
        return self._refusal(module, name) if self.holds(module, name) else None

    def _refusal(self, module: nn.Module, name: str) -> str:
        scale = scale_of(name, _names(module))
        codes = "8-bit floats" if is_float8(getattr(module, name)) else "codes"
        beside = f" whose scale stands beside them ({scale})" if scale else ""
        return (
            f"its {name} holds {codes}{beside}, and an update cannot be written into them. Load the 16-bit "
            "weights that they were made of, put the adapter on them with PeftModel.from_pretrained and "
            "merge there; or keep the adapter unmerged"
        )


class FP8(_Codes):
    """A weight of 8-bit floats, as in transformers' `FP8Linear` and the layers of compressed-tensors."""

    name = quantization = "fp8"
    #: Types that are always refused, since their tensors are only filled on loading.
    known: ClassVar[frozenset[str]] = frozenset(
        {
            "transformers.integrations.finegrained_fp8.FP8Linear",
            "transformers.integrations.finegrained_fp8.FP8Embedding",
            "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear",
        }
    )

    def holds(self, module: nn.Module, name: str) -> bool:
        """A tensor of 8-bit floats of any name; any weight of the types above."""
        tensor = _tensor(module, name)
        if tensor is None:
            return False
        return is_float8(tensor) or (name == "weight" and not self.known.isdisjoint(type_names(type(module))))


class ScaledCodes(_Codes):
    """A matrix of any type with a scale, that no other backend supports."""

    name = "scaled"
    quantization = "a code with a scale"

    def holds(self, module: nn.Module, name: str) -> bool:
        """A matrix, or a stack of matrices, for which another tensor is a scale by its name."""
        if not any("scale" in own.lower() for own in (*module._parameters, *module._buffers)):
            return False  # called for nearly all modules
        tensor = _tensor(module, name)
        return tensor is not None and tensor.dim() > 1 and scale_of(name, _names(module)) is not None


def holds_codes(module: nn.Module) -> bool:
    """Whether the weight of a module consists of codes whose scale its forward applies."""
    tensor = _tensor(module, "weight")
    if tensor is None:
        return False
    return is_float8(tensor) or (tensor.dim() > 1 and scale_of("weight", _names(module)) is not None)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters.get(name)
    return module._buffers.get(name) if parameter is None else parameter


def _names(module: nn.Module) -> list[str]:
    tensors = {**module._parameters, **module._buffers}
    return [name for name, tensor in tensors.items() if tensor is not None]
