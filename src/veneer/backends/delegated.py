"""Quantised modules that only their own library can compute with: the branch is added to their output.

GPTQ, AWQ, AQLM and EETQ quantise with calibration data or use layouts of their kernels, so their weight is
neither read nor written here. HQQ's is read. None of these libraries is imported: their modules are
recognised by the qualified names of their types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.backends.base import Backend, plain_linear, type_names
from veneer.errors import Hint, MergeError, TargetError, Text

#: The way out if an initialisation or a variant needs a weight that cannot be read.
WITHOUT_READING = Text(
    "choose an initialisation and a variant that do not need it (",
    Hint("init_lora_weights", True),
    Hint("use_dora", False, ", {}"),
    "), or load the model's 16-bit weights instead",
)
_LINEAR = "torch.nn.modules.linear.Linear"


def _linears(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, _LINEAR)


class Delegated(Backend):
    """Base of the storages that only their own library can compute with."""

    priority = 15
    readable = False

    def serves(self, kind: type) -> bool:
        return any(name in self.geometry for name in type_names(kind))

    def matches(self, module: nn.Module) -> bool:
        return True

    def device(self, module: nn.Module) -> torch.device:
        tensor = next(iter((*module.parameters(), *module.buffers())), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The type of its scales, in which these kernels compute."""
        tensors = (*module.parameters(), *module.buffers())
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float16)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Read from the attributes that these libraries use."""
        layer: Any = module
        if hasattr(layer, "infeatures"):
            return int(layer.infeatures), int(layer.outfeatures)
        return int(layer.in_features), int(layer.out_features)

    def like(self, module: nn.Module, name: str = "weight") -> Tensor:
        size_in, size_out = self.features(module)
        return torch.empty(size_out, size_in, dtype=self.dtype(module), device="meta")

    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """The bias as it is.

        Raises:
            TargetError: For the weight.
        """
        if name == "weight":
            raise TargetError(
                f"the weight of a {type(module).__name__} ({self.quantization}) can be computed with, not "
                "read: ",
                WITHOUT_READING,
            )
        tensor: Tensor = getattr(module, name)
        return tensor.detach()

    def write(self, module: nn.Module, tensor: Tensor, name: str = "weight") -> None:
        """The bias in place.

        Raises:
            MergeError: For the weight.
        """
        if name == "weight":
            raise MergeError(self.refuses_merge(module))
        with torch.no_grad():
            getattr(module, name).copy_(tensor)

    def refuses_merge(self, module: nn.Module) -> str:
        """Always."""
        return (
            f"its weight is quantised by {str(self.quantization).upper()}, into which an update cannot be "
            "written. Load the 16-bit weights that it was made of, put the adapter on them with "
            "PeftModel.from_pretrained, merge there and quantise the result; or keep the adapter unmerged"
        )

    def keep(self, module: nn.Module, name: str = "weight") -> dict[str, Tensor]:
        return {}

    def put_back(self, module: nn.Module, kept: Mapping[str, Tensor], name: str = "weight") -> None:
        """Nothing."""

    def dense(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """An ``nn.Linear``, if the weight can be read.

        Raises:
            MergeError: Where it cannot.
        """
        if not self.readable:
            raise MergeError(f"a {type(module).__name__} cannot be dequantised: {self.refuses_merge(module)}")
        return plain_linear(module, self.read(module).to(dtype or self.dtype(module)))


class GPTQ(Delegated):
    """The layers of GPT-QModel (including those for AWQ models), and of its predecessor AutoGPTQ."""

    name = quantization = "gptq"
    geometry: ClassVar[Mapping[str, str]] = _linears(
        "gptqmodel.nn_modules.qlinear.BaseQuantLinear",
        *(
            f"auto_gptq.nn_modules.qlinear.qlinear_{kernel}.QuantLinear"
            for kernel in ("cuda", "cuda_old", "exllama", "exllamav2", "marlin", "triton", "tritonv2")
        ),
    )


class AWQ(Delegated):
    """The layers of AutoAWQ."""

    name = quantization = "awq"
    geometry: ClassVar[Mapping[str, str]] = _linears(
        "awq.modules.linear.gemm.WQLinear_GEMM",
        "awq.modules.linear.gemv.WQLinear_GEMV",
        "awq.modules.linear.gemv_fast.WQLinear_GEMVFast",
        "awq.modules.linear.marlin.WQLinear_Marlin",
        "awq.modules.linear.exllama.WQLinear_Exllama",
        "awq.modules.linear.exllamav2.WQLinear_ExllamaV2",
    )


class AQLM(Delegated):
    """Additive codebooks."""

    name = quantization = "aqlm"
    geometry: ClassVar[Mapping[str, str]] = _linears("aqlm.inference.QuantizedLinear")


class EETQ(Delegated):
    """Weights of 8 bits in the layout of its kernel, (in, out)."""

    name = quantization = "eetq"
    geometry: ClassVar[Mapping[str, str]] = _linears(
        "eetq.modules.qlinear.EetqLinear",
        "eetq.modules.qlinear.W8A16Linear",
        "transformers.integrations.eetq.EetqLinear",
    )

    def features(self, module: nn.Module) -> tuple[int, int]:
        weight: Any = module.weight if hasattr(module, "weight") else module.qweight
        return int(weight.shape[0]), int(weight.shape[1])


class HQQ(Delegated):
    """Half-quadratic quantisation: its weight can be read, but only its own optimiser could write it."""

    name = quantization = "hqq"
    readable = True
    geometry: ClassVar[Mapping[str, str]] = _linears("hqq.core.quantize.HQQLinear")

    def dtype(self, module: nn.Module) -> torch.dtype:
        dtype = getattr(module, "compute_dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float16

    def read(self, module: nn.Module, name: str = "weight") -> Tensor:
        """What it dequantises to."""
        layer: Any = module
        tensor: Tensor = layer.dequantize() if name == "weight" else getattr(layer, name)
        return tensor.detach()

    def refuses_merge(self, module: nn.Module) -> str:
        """Into the quantised weight."""
        return (
            "its weight is quantised by HQQ, which finds its codes by an optimisation of its own: "
            "merge_and_unload(dequantize=True) merges into ordinary weights; or keep the adapter unmerged"
        )
