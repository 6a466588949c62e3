"""The objects of the facade: Veneer's own, and functions that only other libraries call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn

from ... import backends
from ...adapters import AdapterModule, AdapterSet
from ...config import LoraConfig, PeftConfig, PeftType
from ...config.expressions import Paths
from ...errors import TargetError, VeneerError, VeneerWarning
from ...hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from ...inject.sites import plan
from ...layers import LoraLayer
from ...layers.conv import LoraConv
from ...layers.embedding import LoraEmbedding
from ...layers.linear import LoraLinear
from ...layers.modules_to_save import ModulesToSaveWrapper
from ...layers.parameter import LoraParameter
from ...lora_model import LoraModel
from ...spec import PatternSet
from ...targets import ALL_LINEAR
from .layout import INSIDES, INSIDES_OF_MODELS
from .others import OtherMethod, inside, stub

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
LoraParallelLinear: Any = stub("LoraParallelLinear")
PrefixTuningConfig: Any = stub("PrefixTuningConfig")
PromptLearningConfig: Any = stub("PromptLearningConfig")

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
for _method in INSIDES_OF_MODELS:  # axolotl and ms-swift wrap them when they are imported
    setattr(LoraModel, _method, inside(_method))
    setattr(OtherMethod, _method, inside(_method))

PeftError, PeftWarning, NoMatchingPeftModuleError = VeneerError, VeneerWarning, TargetError
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING = {PeftType.LORA: LoraModel.prefix}

PeftConfigMixin = PeftConfig
ParamWrapper = LoraParameter
Linear = LoraLinear
Embedding = LoraEmbedding
Conv1d = Conv2d = Conv3d = LoraConv


def __getattr__(name: str) -> Any:
    if name == "build_peft_weight_mapping":
        # Needs transformers, which is installed if transformers imports this.
        return importlib.import_module(f"{__package__}.weights").build_peft_weight_mapping
    if name == "get_model_conversion_mapping":
        return importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping
    if name in INSIDES:
        return inside(name)
    return getattr(importlib.import_module("veneer"), name)


class _Over(type):
    """Classes of layers by the class of module that they adapt: for `isinstance` alone."""

    def __instancecheck__(cls, instance: object) -> bool:
        base = type(instance.get_base_layer()) if isinstance(instance, LoraLinear) else object
        return any(kind.__name__ == cls.__name__ for kind in base.__mro__)


class Linear4bit(OtherMethod, metaclass=_Over):
    """A layer over bitsandbytes' 4-bit linear."""


class Linear8bitLt(OtherMethod, metaclass=_Over):
    """A layer over bitsandbytes' 8-bit linear."""


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
    for module in AdapterSet(model).modules():
        for name in [name for name in names if name in module.held_adapters]:
            own = module.trained_parameters(name) if requires_grad else module.adapter_parameters(name)
            for parameter in own:
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
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    return weight.T if fan_in_fan_out else weight


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The quantisation of a model in its configuration, if it is by this method; else None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
    return backends.find(module).read(module, "weight")


def check_adapters_to_merge(module: Any, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Those of some adapters, or of the active ones, that are not merged into a layer."""
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names is a list of names, not {adapter_names!r}")
    names = module.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name not in module.merged_adapters]


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether the targets of a configuration match a path, and its exclusions do not."""

    def matches(option: str) -> bool:
        value = getattr(config, option, None) or ()
        patterns = [value] if isinstance(value, str) else sorted(value)
        return bool(PatternSet(patterns, option).over(Paths([key]))[key])

    return matches("target_modules") and not matches("exclude_modules")


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """The same configuration, with the paths of the linear layers for ``"all-linear"``."""
    if str(peft_config.target_modules).lower() == ALL_LINEAR:
        own = LoraConfig(target_modules=ALL_LINEAR, task_type=peft_config.task_type)
        peft_config.target_modules = {spec.path for spec in plan(model, own).specs if not spec.parameter}
    return peft_config


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Nothing: a Veneer layer reads and writes an offloaded weight where it is kept."""
    yield


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


def is_torchao_available() -> bool:
    return importlib.util.find_spec("torchao") is not None


# -- peft.helpers ----------------------------------------------------------------------------------


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Does nothing: a Veneer layer casts its factors to the input's type, never the input."""
    yield


class DoraCaching:
    """Nothing, for callers of PEFT's API: the norms of frozen rows are kept without asking for it."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, enabled: bool = True) -> None:
        self.enabled = enabled


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
