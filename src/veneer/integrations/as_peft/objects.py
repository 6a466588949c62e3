"""The objects of the facade: Veneer's own, and functions that only other libraries call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn

from ...adapters import AdapterModule, AdapterSet
from ...config import PeftConfig, PeftType
from ...errors import TargetError, VeneerError, VeneerWarning
from ...hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from ...layers import LoraLayer
from ...layers.conv import LoraConv
from ...layers.embedding import LoraEmbedding
from ...layers.linear import LoraLinear
from ...layers.modules_to_save import ModulesToSaveWrapper
from ...lora_model import LoraModel
from .others import stub

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]

BaseTuner = LoraModel
BaseTunerLayer = LoraLayer
AuxiliaryTrainingWrapper = ModulesToSaveWrapper
LoHaLayer: Any = stub("LoHaLayer")
LoKrLayer: Any = stub("LoKrLayer")
factorization: Any = stub("factorization")
PrefixTuningConfig: Any = stub("PrefixTuningConfig")
PromptLearningConfig: Any = stub("PromptLearningConfig")

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
PeftError, PeftWarning, NoMatchingPeftModuleError = VeneerError, VeneerWarning, TargetError
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING = {PeftType.LORA: LoraModel.prefix}

Linear = LoraLinear
Embedding = LoraEmbedding
Conv1d = Conv2d = Conv3d = LoraConv


def __getattr__(name: str) -> Any:
    if name == "build_peft_weight_mapping":
        # Needs transformers, which is installed if transformers imports this.
        return importlib.import_module(f"{__package__}.weights").build_peft_weight_mapping
    return getattr(importlib.import_module("veneer"), name)


# -- peft.functional -------------------------------------------------------------------------------


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type = AdapterModule,
) -> None:
    AdapterSet(model).activate(adapter_name, inference_mode=inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: type = AdapterModule
) -> list[str] | None:
    """Delete an adapter from every layer; returns the adapters that are active then, or None."""
    adapters = AdapterSet(model)
    adapters.delete(adapter_name)
    return adapters.active() or None


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Freeze or unfreeze the parameters of some adapters."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    for name in names:
        for parameter in AdapterSet(model).parameters(name):
            parameter.requires_grad_(requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Keep an adapter's half-precision parameters in float32."""
    if not autocast_adapter_dtype:
        return
    for parameter in AdapterSet(model).parameters(adapter_name):
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


# -- peft.utils ------------------------------------------------------------------------------------


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of a module, the module, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def infer_device() -> str:
    """The type of device that weights are loaded to."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """Which modules FSDP shards as units: the model's blocks, and every trainable leaf by itself.

    FSDP1 flattens the parameters of a unit into one, so frozen and trainable ones may not share a unit. The
    classes of blocks are the model's `_no_split_modules`, or those named in `FSDP_TRANSFORMER_CLS_TO_WRAP`.

    Raises:
        VeneerError: A named class does not exist in the model.
    """
    from torch.distributed.fsdp.wrap import (
        _or_policy,
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    own = getattr(model, "_no_split_modules", None) or ()
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(own))
    wanted = {name for name in named.split(",") if name}
    classes = {type(module) for module in model.modules() if type(module).__name__ in wanted}
    lacking = wanted - {cls.__name__ for cls in classes}
    if "FSDP_TRANSFORMER_CLS_TO_WRAP" in os.environ and lacking:
        raise VeneerError(
            f"FSDP_TRANSFORMER_CLS_TO_WRAP names {sorted(lacking)}, which this model does not have"
        )
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trainable_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _is_trainable_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not any(True for _ in module.children()) and weight is not None and bool(weight.requires_grad)


def gather_params_ctx(
    param: Any, modifier_rank: int | None = 0, fwd_module: Any = None
) -> AbstractContextManager[Any]:
    """Gather parameters that DeepSpeed's ZeRO-3 has sharded; otherwise does nothing."""
    if importlib.util.find_spec("deepspeed") is not None:
        from transformers.integrations import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():
            import deepspeed  # type: ignore[import-not-found, unused-ignore]

            gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
                param, modifier_rank=modifier_rank, fwd_module=fwd_module
            )
            return gathered
    return nullcontext()


def init_empty_weights() -> AbstractContextManager[Any]:
    return torch.device("meta")


def is_bnb_available() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


is_bnb_4bit_available = is_bnb_available


# -- peft.helpers ----------------------------------------------------------------------------------


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Does nothing: a Veneer layer casts its factors to the input's type, never the input."""
    yield


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the strength of all adapters of a model inside this context.

    Raises:
        VeneerError: The model has no adapter.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier is a number, not {type(multiplier).__name__}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise VeneerError("this model has no adapter whose strength could be changed")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * multiplier for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether there is an adapter configuration at this path or id."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (VeneerError, OSError):
        return False
    return True


def update_forward_signature(model: Any) -> None:
    """Give `model.forward` the signature of the base model's, for code that inspects it."""
    _copy_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Give `model.generate` the signature of the base model's, for code that inspects it."""
    _copy_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Give `forward`, `generate` or both the signature of the base model's."""
    names: Mapping[str, tuple[str, ...]] = {
        "forward": ("forward",),
        "generate": ("generate",),
        "all": ("forward", "generate"),
    }
    if method not in names:
        raise VeneerError(f"method is one of {sorted(names)}, not {method!r}")
    for name in names[method]:
        _copy_signature(model, name)


def _copy_signature(model: Any, name: str) -> None:
    ours = getattr(type(model), name)
    theirs = getattr(type(model.get_base_model()), name)

    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    method.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    setattr(model, name, MethodType(method, model))
