"""The initial tensors of an adapter in one layer: from its initialisation, or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from veneer import backends, inits, variants
from veneer.errors import ConfigError, Hint
from veneer.inits import InitRequest, InitResult
from veneer.layers.factor import RESIDUAL
from veneer.layers.layer import LoraLayer
from veneer.spec import LoraSpec
from veneer.variants import ParameterRequest


def initialise(layer: LoraLayer, spec: LoraSpec, seed: int) -> InitResult:
    """Compute the initial factors for ``spec``; nothing is stored.

    Args:
        layer: The layer.
        spec: What it gets.
        seed: The adapter's draw from torch's global generator.

    Raises:
        ConfigError: If the initialisation needs statistics, and nothing was measured.
    """
    if layer.tied_adapter is not None:
        return start_from(layer, spec, {}, {})
    request, init = _request(layer, spec, seed), inits.find(spec.init)
    if init.lacks(request.stats):
        raise ConfigError(
            Hint("init_lora_weights", spec.init),
            " starts from what was measured on data, and nothing was for "
            f"{spec.path or 'this module'}: call {init.measured_by} on this very model first",
        )
    start = init(request)
    extra = _start_of_extra(layer, spec, start, request)
    return replace(start, extra=extra) if extra else start


def tensor_shapes(layer: LoraLayer, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Names on disk (below the module's path) and shapes of an adapter's tensors in a layer.

    First A, B and the bias of B, if there is one; then the frozen term and the variant's parameters.
    """
    request = _request(layer, spec, 0)
    suffix = "" if layer.lookup else ".weight"
    name_a, name_b = layer.factor_names
    result = {f"{name_a}{suffix}": request.shape_a, f"{name_b}{suffix}": request.shape_b}
    if spec.lora_bias:
        result[f"{name_b}.bias"] = request.shape_b[:1]
    if inits.find(spec.init).subtracts_start:
        result.update(zip(RESIDUAL, (request.shape_a, request.shape_b), strict=True))
    variant = variants.get(spec.variant)
    if not variant.has_parameters:
        return result
    more = variant.shapes(_of_variant(layer, spec, None, request))
    return {**result, **{key: tuple(shape) for key, shape in more.items()}}


def start_from(
    layer: LoraLayer, spec: LoraSpec, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> InitResult:
    """The initial tensors of an adapter that is loaded.

    Missing factors are zero, and missing parameters of the variant start as for a new adapter. A layer that
    uses another one's factors needs no tensors.

    Args:
        layer: The layer.
        spec: What it gets.
        tensors: By the names of `tensor_shapes`; some may be missing.
        shapes: What `tensor_shapes` returned.
    """
    if layer.tied_adapter is not None:
        a, b = (torch.empty(shape, device="meta") for shape in layer.shapes(layer.base_layer, spec.r))
        return InitResult(a, b)
    names = [key for key in shapes if key.startswith(layer.factor_names)]
    values = [tensors[k] if k in tensors else torch.zeros(shapes[k], device="cpu") for k in names]
    residual = None
    if RESIDUAL[0] in shapes:
        a, b = (tensors.get(k, torch.zeros(shapes[k], device="cpu")) for k in RESIDUAL)
        residual = a, b
    start = InitResult(values[0], values[1], values[2] if len(values) > 2 else None, residual=residual)
    others = [key for key in shapes if key not in (*names, *RESIDUAL)]
    extra = {key: tensors[key] for key in others if key in tensors}
    if len(extra) < len(others):
        extra = {**_start_of_extra(layer, spec, start, _request(layer, spec, 0)), **extra}
    return replace(start, extra=extra) if extra else start


def _request(layer: LoraLayer, spec: LoraSpec, seed: int) -> InitRequest:
    def matrix() -> Tensor:
        base, name = layer.original_base(), layer.weight_name
        return layer.to_matrix(backends.find(base, name).read(base, name))

    shape_a, shape_b = layer.shapes(layer.geometry(), spec.r)
    return InitRequest(
        spec=spec,
        shape_a=shape_a,
        shape_b=shape_b,
        bias=spec.lora_bias,
        lookup=layer.lookup,
        matrix=matrix,
        seed=seed,
        stats=inits.statistics_of(layer.get_base_layer(), layer.weight_name),
    )


def _of_variant(
    layer: LoraLayer, spec: LoraSpec, start: InitResult | None, request: InitRequest
) -> ParameterRequest:
    def matrix() -> Tensor:
        assert start is not None
        return layer.matrix() if start.base is None else start.base

    def update() -> tuple[Tensor, Tensor]:
        assert start is not None
        return layer.matrices(*start.update())

    return ParameterRequest(
        spec=spec,
        vector_shape=layer.vector_shape(),
        shape_a=request.shape_a,
        shape_b=request.shape_b,
        matrix=matrix,
        update=update,
        generator=request.generator,
    )


def _start_of_extra(
    layer: LoraLayer, spec: LoraSpec, start: InitResult, request: InitRequest
) -> Mapping[str, Tensor]:
    variant = variants.get(spec.variant)
    if not variant.has_parameters:
        return {}
    asked = _of_variant(layer, spec, start, request)
    shapes, tensors = variant.shapes(asked), variant.parameters(asked)
    made = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if made != {key: tuple(shape) for key, shape in shapes.items()}:
        raise ConfigError(
            f"the variant {spec.variant!r} announced parameters of the shapes {dict(shapes)}, and gave {made}"
        )
    return tensors
