"""Weights that bitsandbytes stores: 4 bits (nf4, fp4, with their scales quantised or not) and 8 bits.

The library is only looked up among the loaded modules: without it no such layer can exist.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from veneer.backends.base import Backend, plain_linear, type_names

_MODULES = "bitsandbytes.nn.modules"


def _library() -> Any:
    return sys.modules["bitsandbytes"]


class _Quantised(Backend):
    """Base of both storages. The bias is an ordinary parameter."""

    priority = 20

    def serves(self, kind: type) -> bool:
        return any(name in self.fresh_output for name in type_names(kind))

    def device(self, module: nn.Module) -> torch.device:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.device

    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The weight dequantised to its original type; any other tensor as it is."""
        if name == "weight":
            return self._dequantised(module)
        tensor: Tensor = getattr(module, name)
        return tensor.detach()

    def write(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> None:
        """Quantise into a new parameter with the settings of the present one, which is not changed."""
        if name == "weight":
            self.writing(module, tensor)()
            return
        with torch.no_grad():
            getattr(module, name).copy_(tensor)

    def writing(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> Callable[[], None]:
        if name == "weight":
            return self._storing(module, tensor.detach())
        return super().writing(module, tensor, name)

    def _dequantised(self, module: nn.Module) -> Tensor:
        raise NotImplementedError

    def _storing(self, module: nn.Module, tensor: Tensor) -> Callable[[], None]:
        raise NotImplementedError


class FourBits(_Quantised):
    """`bitsandbytes.nn.Linear4bit`: codes of 4 bits, scaled by blocks of 64 (or another number of) values."""

    name = "bitsandbytes-4bit"
    quantization = "bnb 4bit"
    fresh_output: ClassVar[tuple[str, ...]] = (f"{_MODULES}.Linear4bit",)

    def matches(self, module: nn.Module) -> bool:
        return _state(module) is not None

    def dtype(self, module: nn.Module) -> torch.dtype:
        dtype = getattr(module, "compute_dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else self.like(module).dtype

    def like(self, module: nn.Module, name: str = "weight") -> Tensor:
        state = _state(module)
        return torch.empty(state.shape, dtype=state.dtype, device="meta")

    def _dequantised(self, module: nn.Module) -> Tensor:
        if _packed(module):
            module = copy.deepcopy(module)
            _unpack(module)
        weight: Tensor = module.weight.data  # type: ignore[assignment]
        dense: Tensor = _library().functional.dequantize_4bit(weight, _state(module))
        return dense

    def _again(self, module: nn.Module, tensor: Tensor) -> Any:
        """A parameter with the quantisation and the original type of the present one."""
        state, old = _state(module), cast(Tensor, module.weight)
        new = (
            _library()
            .nn.Params4bit(
                tensor.to(old.device, copy=True),
                requires_grad=False,
                blocksize=state.blocksize,
                compress_statistics=state.nested,
                quant_type=state.quant_type,
                quant_storage=old.dtype,
            )
            .to(old.device)
        )
        new.quant_state.dtype = state.dtype
        return new

    def _storing(self, module: nn.Module, tensor: Tensor) -> Callable[[], None]:
        if _packed(module):
            _unpack(module)
        return partial(self._put, module, self._again(module, tensor.float()))

    def _put(self, module: nn.Module, weight: Any) -> None:
        module.weight = weight
        weight.module = module
        module.quant_state = weight.quant_state

    def keep(self, module: nn.Module, name: str = "weight") -> dict[str, Tensor]:
        return {"weight": module.weight}  # type: ignore[dict-item]

    def put_back(self, module: nn.Module, kept: Mapping[str, Tensor], name: str = "weight") -> None:
        self._put(module, kept["weight"])

    def parts(
        self, module: nn.Module, kept: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        weight: Any = kept["weight"]
        return {"weight": weight}, {"quant_state": weight.quant_state}

    def prepare_backward(self, module: nn.Module) -> None:
        """Keep the layout that allows gradients to pass.

        In evaluation, on CPUs with bfloat16 instructions, bitsandbytes changes the layout of the weight,
        rounds its scales, and from then on computes without autograd, even in training: layers before this
        one would silently get no gradient.
        """
        if _packed(module):
            _unpack(module)
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010

    def dense(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return plain_linear(module, self.read(module).to(dtype or self.like(module).dtype))


class EightBits(_Quantised):
    """`bitsandbytes.nn.Linear8bitLt`: LLM.int8(), one scale for each row.

    With ``has_fp16_weights=True`` the weight is dense, and its codes are recomputed after a write.
    """

    name = "bitsandbytes-8bit"
    quantization = "bnb 8bit"
    fresh_output = (f"{_MODULES}.Linear8bitLt",)

    def matches(self, module: nn.Module) -> bool:
        layer: Any = module
        return self._codes(module) or bool(layer.state.has_fp16_weights)

    def _codes(self, module: nn.Module) -> bool:
        return cast(Tensor, module.weight).dtype == torch.int8

    def dtype(self, module: nn.Module) -> torch.dtype:
        """It computes in the type of its input, which the bias has too. Without a bias, float16."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias = getattr(module, "bias", None)
        if weight.is_floating_point():
            return weight.dtype
        return bias.dtype if isinstance(bias, Tensor) else torch.float16

    def like(self, module: nn.Module, name: str = "weight") -> Tensor:
        """Without reading the codes."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        return torch.empty(weight.shape, dtype=dtype, device="meta")

    def _scale(self, module: nn.Module) -> Tensor:
        """The first forward moves it from the parameter to the state."""
        layer: Any = module
        scale: Tensor = layer.state.SCB if getattr(layer.weight, "SCB", None) is None else layer.weight.SCB
        return scale

    def _dequantised(self, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight.data  # type: ignore[assignment]
        if not self._codes(module):
            return weight
        dense: Tensor = _library().functional.int8_vectorwise_dequant(weight, self._scale(module))
        return dense

    def _storing(self, module: nn.Module, tensor: Tensor) -> Callable[[], None]:
        layer: Any = module
        if self._codes(module):
            codes, scale = _quantise_rows(tensor)
            kept = {"weight": codes, "scale_bits": scale.view(torch.int32)}
            return partial(self._put, layer, self.parts(module, kept)[0]["weight"])
        new = _library().nn.Int8Params(
            tensor.to(layer.weight.dtype, copy=True),
            requires_grad=layer.weight.requires_grad,
            has_fp16_weights=True,
        )
        return partial(self._put, layer, new)

    def _put(self, module: nn.Module, weight: Any) -> None:
        layer: Any = module
        layer.weight = weight
        layer.state = _fresh(layer.state)

    def keep(self, module: nn.Module, name: str = "weight") -> dict[str, Tensor]:
        """The codes, and the bits of the scales: a cast of the model must not round them."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        if not self._codes(module):
            return {"weight": weight}
        return {"weight": weight.data, "scale_bits": self._scale(module).view(torch.int32)}

    def put_back(self, module: nn.Module, kept: Mapping[str, Tensor], name: str = "weight") -> None:
        self._put(module, self.parts(module, kept)[0]["weight"])

    def parts(
        self, module: nn.Module, kept: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """A new parameter, since a forward takes codes and scales out of it, and an empty state."""
        weight = kept["weight"]
        if "scale_bits" in kept:
            scale = kept["scale_bits"].view(torch.float32)
            weight = _library().nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scale)
        return {"weight": weight}, {"state": _fresh(module.state)}

    def dense(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return plain_linear(module, self.read(module).to(dtype or self.dtype(module)))


def _fresh(state: Any) -> Any:
    fresh = copy.copy(state)
    fresh.reset_grads()
    return fresh


def _quantise_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    # The kernel only takes float16.
    codes, scale, _ = _library().functional.int8_vectorwise_quant(
        tensor.detach().to(torch.float16).contiguous()
    )
    return codes, scale


def _state(module: nn.Module) -> Any:
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _packed(module: nn.Module) -> bool:
    """Whether the weight has the layout of the CPU kernel, which no other function can read."""
    return bool(getattr(_state(module), "packing_format_for_cpu", False))


def _unpack(module: nn.Module) -> None:
    module.state_dict()  # the library converts the weight to the ordinary layout for this
    module.quant_state = _state(module)
