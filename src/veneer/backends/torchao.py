"""Weights that torchao stores: an ordinary module whose weight is one of its tensor subclasses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.backends.base import Backend, plain_linear, type_names
from veneer.errors import MergeError


class TorchAO(Backend):
    """Reading dequantises the tensor; writing quantises with the same settings."""

    name = "torchao"
    quantization = "torchao"
    priority = 20

    def matches(self, module: nn.Module) -> bool:
        return self.holds(module, "weight")

    def holds(self, module: nn.Module, name: str) -> bool:
        """A parameter of one of its types, of any name; only the one named weight is read and written."""
        weight = module._parameters.get(name)
        if type(weight) in (nn.Parameter, Tensor):
            return False
        return isinstance(weight, Tensor) and "torchao.utils.TorchAOBaseTensor" in type_names(type(weight))

    def device(self, module: nn.Module) -> torch.device:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.device

    def dtype(self, module: nn.Module) -> torch.dtype:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.dtype

    def like(self, module: nn.Module, name: str = "weight") -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    @torch.no_grad()
    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The weight dequantised to its original type; any other tensor as it is.

        Raises:
            MergeError: If such a weight cannot be dequantised.
        """
        tensor: Any = getattr(module, name).detach()
        if name != "weight":
            return tensor  # type: ignore[no-any-return]
        try:
            dense: Tensor = tensor.dequantize()
        except NotImplementedError as error:
            raise MergeError(f"torchao cannot dequantise a {type(tensor).__name__}: {error}") from error
        return dense

    @torch.no_grad()
    def write(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> None:
        """Quantise into a new parameter with the settings of the present one, which is not changed."""
        if name == "weight":
            self.writing(module, tensor)()
        else:
            getattr(module, name).copy_(tensor)

    @torch.no_grad()
    def writing(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> Callable[[], None]:
        if name != "weight":
            return super().writing(module, tensor, name)
        new = nn.Parameter(_again(module.weight, tensor), requires_grad=False)
        return partial(self.put_back, module, {"weight": new})

    def refuses_merge(self, module: nn.Module) -> str | None:
        """Refuses types whose tensors do not tell how they were quantised."""
        kind = type(module.weight).__name__
        if kind in _QUANTISERS:
            return None
        return (
            f"its weight is a {kind}, and how to quantise the sum again cannot be read off such a tensor: "
            "merge_and_unload(dequantize=True) merges into ordinary weights"
        )

    def keep(self, module: nn.Module, name: str = "weight") -> dict[str, Tensor]:
        return {"weight": module.weight}  # type: ignore[dict-item]

    def put_back(self, module: nn.Module, kept: Mapping[str, Tensor], name: str = "weight") -> None:
        """The parameter itself, or a new one after a cast."""
        weight = kept["weight"]
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=False)
        module.weight = weight

    def dense(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return plain_linear(module, self.read(module).to(dtype or self.dtype(module)))


def _again(old: Any, tensor: Tensor) -> Any:
    return _QUANTISERS[type(old).__name__](old, tensor.detach().to(device=old.device, dtype=old.dtype))


def _mapping(zero_point: Tensor | None) -> Any:
    kinds = sys.modules["torchao.quantization"].MappingType
    return kinds.SYMMETRIC if zero_point is None or not zero_point.any() else kinds.ASYMMETRIC


def _granularity(block: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    kinds = sys.modules["torchao.quantization"]
    if block == shape:
        return kinds.PerTensor()
    if set(block[:-1]) <= {1}:
        return kinds.PerRow() if block[-1] == shape[-1] else kinds.PerGroup(block[-1])
    return kinds.PerBlock(block)


def _int8(old: Any, tensor: Tensor) -> Any:
    return type(old).from_hp(
        tensor,
        _granularity(tuple(old.block_size), tuple(old.shape)),
        mapping_type=_mapping(old.zero_point),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )


def _intx(old: Any, tensor: Tensor) -> Any:
    return type(old).from_hp(
        tensor,
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=_mapping(old.zero_point),
        activation_quantization=old.activation_quantization,
    )


#: By the name of the tensor's type: how to quantise a dense tensor like another one.
_QUANTISERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
}
