"""Linears in each storage that a backend knows: real ones, and stand-ins where the library needs a GPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from torchao.quantization import (
    FqnToConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)

from veneer.backends import base
from veneer.backends.base import Backend
from veneer.registry import load_plugins

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it uses parts of torch.jit that torch deprecates
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def backends() -> tuple[Backend, ...]:
    """All storages that are registered, in the order in which they are asked."""
    load_plugins()
    return tuple(base._backends)


def four_bits(linear: nn.Module, quant_type: str = "nf4", nested: bool = True, **options: Any) -> nn.Module:
    """A linear in 4 bits of bitsandbytes, its scales quantised too."""
    made = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, **options)
    made.weight = Params4bit(
        linear.weight.detach().clone(), requires_grad=False, quant_type=quant_type, compress_statistics=nested
    )
    made.weight.module = made
    made.bias = copy.deepcopy(linear.bias)
    return made.to("cpu").train(linear.training)


def eight_bits(linear: nn.Module, **options: Any) -> nn.Module:
    """A linear in 8 bits of bitsandbytes."""
    options = {"has_fp16_weights": False, **options}
    made = Linear8bitLt(linear.in_features, linear.out_features, bias=linear.bias is not None, **options)
    made.weight = Int8Params(
        linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=options["has_fp16_weights"]
    )
    made.bias = copy.deepcopy(linear.bias)
    return made.to("cpu").train(linear.training)


def torchao(linear: nn.Module, config: Any = None) -> nn.Module:
    """A linear whose weight torchao has quantised, to 8 bits unless said otherwise."""
    model = nn.Sequential(linear)
    quantize_(model, Int8WeightOnlyConfig() if config is None else config)
    return model[0]


def torchao_weight(module: nn.Module) -> nn.Module:
    """An embedding or a 2-D convolution whose weight torchao has quantised to 8 bits, row by row."""
    model = nn.Sequential(module)
    kind = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, kind, filter_fn=lambda inner, name: inner is module)
    return model[0]


def torchao_parameter(module: nn.Module) -> nn.Module:
    """A module whose one bare parameter torchao has quantised to 8 bits."""
    ((name, _),) = module.named_parameters()
    quantize_(module, FqnToConfig({name: Int8WeightOnlyConfig()}), filter_fn=None)
    return module


def torchao_four_bits(linear: nn.Module, group: int = 4) -> nn.Module:
    """A linear whose weight torchao has quantised to 4 bits in groups of columns."""
    return torchao(linear, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)))


def half_quadratic(linear: nn.Module, bits: int = 4) -> nn.Module:
    """A linear that HQQ has quantised, on the CPU by its backend in plain torch."""
    plain = copy.deepcopy(linear).requires_grad_(False)
    made = HQQLinear(
        plain,
        BaseQuantizeConfig(nbits=bits, group_size=None, axis=1),
        compute_dtype=linear.weight.dtype,
        device="cpu",
    )
    return made.train(linear.training)


class Delegated(nn.Module):
    """What the layers of GPU-only libraries are seen from outside: sizes, codes, scales, a forward."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)
        self.bias = copy.deepcopy(linear.bias)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """With what the codes stand for."""
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype), self.bias)


class AutoGPTQ(Delegated):
    """With the older library's names of the sizes."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear)
        self.infeatures, self.outfeatures = self.in_features, self.out_features
        del self.in_features, self.out_features


class Transposed(Delegated):
    """EETQ's: a weight (in, out) of integers, and no sizes."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear)
        del self.in_features, self.out_features
        self.weight = nn.Parameter(self.qweight.T.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """With what the codes stand for."""
        return nn.functional.linear(x, self.weight.T.to(x.dtype) * self.scales.to(x.dtype), self.bias)


class Coded:
    """Mixed into a layer's type: one of its tensors is codes, with a scale beside it, as in `FP8Linear`."""

    plain: type[nn.Module]
    coded: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """With what the codes stand for."""
        tensors = self._parameters  # type: ignore[attr-defined]
        scale = tensors[f"{self.coded}_scale_inv"]
        dense = object.__new__(self.plain)
        dense.__dict__.update(self.__dict__)
        dense.__dict__["_parameters"] = {**tensors, self.coded: tensors[self.coded].to(scale.dtype) * scale}
        return self.plain.forward(dense, *args, **kwargs)


def coded(module: nn.Module, dtype: torch.dtype = torch.float8_e4m3fn) -> nn.Module:
    """A layer whose weight, or first parameter, is codes of a type, with a scale beside it."""
    name = next(name for name, _ in module.named_parameters() if "bias" not in name)
    weight = module._parameters[name].detach()
    scale = weight.abs().amax() / 400
    plain = type(module)
    known = f"codes.{plain.__qualname__}"
    fields = {"plain": plain, "coded": name, "__module__": "codes", "__qualname__": plain.__qualname__}
    made = _made.setdefault(known, type(plain.__name__, (Coded, plain), fields))
    made.__reduce_ex__ = lambda self, protocol: (_rebuild, (plain, known, self.__dict__))  # type: ignore[method-assign]
    module.__class__ = made
    module._parameters[name] = nn.Parameter((weight / scale).to(dtype), requires_grad=False)
    module._parameters[f"{name}_scale_inv"] = nn.Parameter(scale, requires_grad=False)
    return module


def named(base: type[nn.Module], qualified: str) -> Callable[[nn.Module], nn.Module]:
    """Makes modules of a type that has the qualified name of another library's."""
    module, _, name = qualified.rpartition(".")
    made = type(name, (base,), {"__module__": module, "__qualname__": name})
    # Pickles look the type up by its name; there is no such library here to find it in.
    made.__reduce_ex__ = lambda self, protocol: (_rebuild, (base, qualified, self.__dict__))  # type: ignore[method-assign]
    _made[qualified] = made
    return made


_made: dict[str, type[nn.Module]] = {}


def _rebuild(base: type[nn.Module], qualified: str, state: dict[str, Any]) -> nn.Module:
    module = object.__new__(_made[qualified])
    module.__dict__.update(state)
    return module


#: A linear in the storage of each backend that has one, by the backend's name.
QUANTISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bitsandbytes-4bit": four_bits,
    "bitsandbytes-8bit": eight_bits,
    "torchao": torchao,
    "gptq": named(Delegated, "gptqmodel.nn_modules.qlinear.BaseQuantLinear"),
    "awq": named(Delegated, "awq.modules.linear.gemm.WQLinear_GEMM"),
    "aqlm": named(Delegated, "aqlm.inference.QuantizedLinear"),
    "eetq": named(Transposed, "transformers.integrations.eetq.EetqLinear"),
    "hqq": half_quadratic,
    "fp8": coded,
    "scaled": partial(coded, dtype=torch.float16),
}
#: Those whose merge is refused, and what the refusal says.
UNMERGEABLE = {
    "gptq": "16-bit weights",
    "awq": "16-bit weights",
    "aqlm": "16-bit weights",
    "eetq": "16-bit weights",
    "fp8": "whose scale stands beside them",
    "scaled": "whose scale stands beside them",
    "hqq": "dequantize=True",
}
