"""Making one LoRA layer: checks, the random draw and the type of factors; and `wrap` for a single module."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from veneer import backends, inits, variants
from veneer.adapters import check_adapter_name
from veneer.config import LoraConfig, as_config, unsupported_options
from veneer.errors import ConfigError, Hint, TargetError, Text
from veneer.layers.layer import LoraLayer, find
from veneer.layers.refused import refusal
from veneer.layers.start import initialise
from veneer.spec import LoraSpec, resolve
from veneer.wording import bullets

_HALF = (torch.float16, torch.bfloat16)


def draw_seed() -> int:
    """One draw of torch's global generator; in a process group all ranks get that of rank 0."""
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device="cpu")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        backend = torch.distributed.get_backend()
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else seed.device
        shared = seed.to(device)
        torch.distributed.broadcast(shared, src=0)
        seed = shared.cpu()
    return int(seed)


def check_config(config: Any) -> LoraConfig:
    """The configuration, if Veneer supports all of it.

    Raises:
        ConfigError: Listing every option that cannot.
    """
    config = as_config(config)
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"a LoraConfig is needed, got {type(config).__name__}")
    names = [str(n) for init in inits.base.inits() for n in init.names if isinstance(n, str)]
    if problems := unsupported_options(config, variants.registry.names(), names):
        raise ConfigError(bullets("this configuration cannot be honoured:", problems))
    return config


def why_not(layer: LoraLayer, spec: LoraSpec) -> str | Text | None:
    """Why a layer cannot get what ``spec`` asks for, or None."""
    kind = type(layer.base_layer).__name__
    option = Hint("init_lora_weights", spec.init)
    if layer.merged and inits.find(spec.init).replaces_base:
        merged = ", ".join(map(repr, layer.merged_adapters))
        return Text(option, f" replaces the base weight, which holds the merged {merged}: unmerge first")
    if (reason := layer.refuses(layer.geometry(), spec)) is not None:
        return reason
    init = inits.find(spec.init)
    if init.replaces_base and layer.backend.quantization is not None:
        way_out = (
            ", then replace_lora_weights_loftq(model, model_path)"
            if layer.backend.readable
            else ", or from the model's 16-bit weights"
        )
        by = layer.backend.quantization
        return Text(
            option,
            f" needs the unquantised weight, and this one is quantised by {by}: start with ",
            Hint("init_lora_weights", True),
            way_out,
        )
    if (init.subtracts_start or not init.exact) and not layer.is_linear():
        return Text(
            option,
            f" needs a branch that is linear in A, and the forward of this {kind} does more with its weight "
            "than multiply",
        )
    if init.measures_inputs and not layer.takes_rows:
        return Text(
            option,
            f" starts from directions of the layer's inputs, and a {kind} has none: it is given indices, "
            "several inputs, or holds bare parameters",
        )
    backend, variant = layer.backend, variants.get(spec.variant)
    reads = variant.reads_weight and not variant.additive
    if init.linear_only and not (layer.linear or layer.lookup):
        return Text(option, f" is for linear layers and embeddings, and this is a {kind}")
    if init.freezes_b:
        a, b = layer.shapes(layer.geometry(), spec.r)
        if spec.r > (rank := min(a[1], b[0])):
            return Text(
                option,
                f" freezes B on directions of the weight, which has {rank}: too few for ",
                Hint("r", spec.r),
            )
    starts_from_weight = init.reads_weight or init.subtracts_start or init.replaces_base
    if not backend.readable and (reads or starts_from_weight):
        needing = spec.variant if reads else spec.init
        return f"{needing!r} needs the base weight, which cannot be read as {backend.quantization} stores it"
    return inits.find(spec.init).refuses(spec, kind, layer.is_matrix()) or variants.get(spec.variant).refuses(
        spec, kind
    )


def with_variant_options(spec: LoraSpec, config: LoraConfig) -> LoraSpec:
    options = dict(variants.get(spec.variant).options(config))
    return replace(spec, variant_options=options) if options else spec


def factor_dtype(layer: LoraLayer, autocast_adapter_dtype: bool = True) -> torch.dtype:
    """The type of new factors: that of the base, but by default float32 beside 16-bit weights.

    Beside quantised weights, which have no floating type, it is always float32, as in PEFT.
    """
    backend = layer.backend
    if backend.quantization is not None:
        return torch.float32
    base = backend.tensor_dtype(layer.get_base_layer(), layer.weight_name)
    if base in _HALF:
        return torch.float32 if autocast_adapter_dtype else base
    return base if base in (torch.float32, torch.float64) else torch.float32


def wrap(
    module: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> LoraLayer:
    """Put an adapter on one module, without a model around it.

    The module is frozen, and the adapter becomes active. The result can be trained, merged and unmerged by
    itself: ``layer(x)``, ``layer.merge()``, ``layer.unmerge()``.

    Args:
        module: A linear layer, convolution or embedding, or a layer that `wrap` returned, to add another
            adapter.
        config: The configuration, of which fields that choose modules are ignored. Not changed.
        adapter_name: The adapter's name.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.

    Returns:
        The layer that replaces ``module``; ``layer.base_layer`` is the module itself.

    Raises:
        ConfigError: If an option cannot be honoured.
        AdapterNameError: If the name is taken or unusable.
        TargetError: If such a module cannot be adapted. It is unchanged then.
    """
    check_adapter_name(adapter_name, module.held_adapters if isinstance(module, LoraLayer) else ())
    check_config(config)
    cls = find(module)
    reason: str | Text | None
    if isinstance(module, LoraLayer):
        layer = module
    elif cls is None:
        reason = refusal(module) or "Veneer has no layer for this type"
        raise TargetError(f"a {type(module).__name__} cannot be adapted: {reason}")
    else:
        layer = cls(module)
    config = copy.deepcopy(config)
    spec = with_variant_options(resolve(config, adapter_name, ""), config)
    if (reason := why_not(layer, spec)) is not None:
        raise TargetError(f"this {type(layer.base_layer).__name__} cannot be adapted as asked: ", reason)
    start, dtype = initialise(layer, spec, draw_seed()), factor_dtype(layer, autocast_adapter_dtype)
    adapter = layer.prepared(spec, start, dtype=dtype, training=not config.inference_mode)
    backends.prepare_backward(layer.base_layer)
    for parameter in layer.base_layer.parameters():
        parameter.requires_grad_(False)
    layer.put_adapter(adapter)
    inits.forget_statistics(layer.get_base_layer())
    layer.set_adapter(adapter_name)
    return layer
