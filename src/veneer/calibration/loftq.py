"""LoftQ for a model that is already quantised: factors that compensate for its quantisation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.base_files import WEIGHTS, BaseFiles
from veneer.calibration.measuring import layers_to_start
from veneer.errors import CheckpointError, ConfigError, Hint
from veneer.hub import download_file
from veneer.layers import LoraLayer
from veneer.peft_model import PeftModel, name_of


def _place_of(model: PeftModel, model_path: str | os.PathLike[str] | None) -> Path:
    """The place of the unquantised weights: as passed, or where the base was loaded from."""
    if model_path is not None:
        return Path(model_path)
    if (name := name_of(model.get_base_model())) is None:
        raise ConfigError(
            "the base does not say where it was loaded from: pass model_path, the directory with its "
            f"unquantised {WEIGHTS}"
        )
    if Path(name).is_dir():
        return Path(name)
    return Path(download_file(name, WEIGHTS, local_files_only=True)).parent


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Initialise an adapter on a quantised model with the error of the quantisation: ``s·BA ≈ W − Q``.

    This is the best approximation of rank r, for each quantised layer; W is read layer by layer from the
    unquantised model's file. The scaling is taken into account, so the adapted layer is closest to W for
    every ``lora_alpha``. Values are written into the existing parameters, so an optimizer remains valid.

    Args:
        peft_model: A PeftModel on a base that is quantised (4 bits, or anything whose weight can be read).
        model_path: Directory, or file, of the unquantised weights in safetensors. None looks where the
            base was loaded from, without the network.
        adapter_name: The adapter.
        callback: Called after each layer with the model and the layer's name; if it returns False, the
            layer's old factors are restored. Use it, for example, to keep only changes that improve the
            outputs.

    Raises:
        ConfigError: If nothing is quantised, or the weights cannot be found.
        CheckpointError: If a weight is missing in the file, or quantised. Nothing has changed then.
        MergeError: If the adapter is merged.

    Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization", 2023, equation 6, one step for a
    given Q.
    """
    layers = _quantised_layers(peft_model, adapter_name)
    prefix = getattr(peft_model.get_base_model(), "base_model_prefix", "") or ""
    weights = BaseFiles(_place_of(peft_model, model_path), prefix=prefix)
    names = _unquantised_names(weights, layers)
    for path, layer in layers.items():
        before = [t.clone() for t in layer.adapter_parameters(adapter_name)]
        _start(layer, adapter_name, weights.read(names[path]))
        if callback is not None and not callback(peft_model, path):
            for parameter, value in zip(layer.adapter_parameters(adapter_name), before, strict=True):
                parameter.copy_(value)


def _quantised_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    layers = {
        path: layer
        for path, layer in layers_to_start(model, adapter).items()
        if layer.backend.quantization is not None and layer.backend.readable
    }
    if not layers:
        raise ConfigError(
            f"no layer of the adapter {adapter!r} is on a quantised weight that can be read; for a model "
            "that is not quantised use ",
            Hint("init_lora_weights", "loftq"),
        )
    return layers


def _unquantised_names(weights: BaseFiles, layers: Iterable[str]) -> dict[str, str]:
    """The name in the files of each layer's weight, by the layer's path."""
    stored = {path: weights.stored_name(f"{path}.weight") for path in layers}
    if missing := [path for path, name in stored.items() if name is None]:
        raise CheckpointError(
            f"the unquantised weights lack {len(missing)} of the {len(stored)} layers, for example "
            f"{', '.join(missing[:3])}: are they of the same model?"
        )
    names = {path: name for path, name in stored.items() if name is not None}
    reasons = [(path, why) for path, name in names.items() if (why := _refusal(weights, name)) is not None]
    if reasons:
        raise CheckpointError(
            f"{len(reasons)} of the {len(stored)} weights in these files are not unquantised ones; "
            f"{reasons[0][0]}: {reasons[0][1]}. Name the directory of the 16-bit weights as model_path"
        )
    return names


def _refusal(weights: BaseFiles, name: str) -> str | None:
    kind = weights.entry(name)[0]
    return weights.codes(name) or (None if kind.startswith(("F", "BF")) else f"it is stored as {kind}")


def _start(layer: LoraLayer, name: str, weight: Tensor) -> None:
    a, b, _ = layer.factors(name)
    quantised = layer.matrix().float()
    lost = layer.to_matrix(weight).to(quantised) - quantised
    u, s, vh = torch.linalg.svd(lost, full_matrices=False)
    rank = min(layer.specs[name].r, s.numel())
    root = (s[:rank] / layer.scaling[name]).sqrt()
    a.zero_().flatten(1)[:rank] = (root[:, None] * vh[:rank]).to(a)
    b.zero_().flatten(1)[:, :rank] = (u[:, :rank] * root).to(b)
