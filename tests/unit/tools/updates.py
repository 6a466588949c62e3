"""The updates of an adapter on disk as a model computes with them, dense."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from tests.unit.integrations.export.adapters import CASES
from veneer import PeftModel
from veneer.layers.layer import LoraLayer
from veneer.layers.parameter import LoraParameter


@torch.no_grad()
def loaded(case: str, place: Path) -> dict[str, Tensor]:
    """Module path -> update as (experts, out, in·k…) or the reverse, of an adapter of a case."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(CASES[case].build(), place)
    layers = dict(model.get_base_model().named_modules())
    return {
        path: _stacked(layer.get_delta_weight("default").double(), isinstance(layer, LoraParameter))
        for path, layer in layers.items()
        if isinstance(layer, LoraLayer)
    }


def _stacked(delta: Tensor, experts: bool) -> Tensor:
    return delta if experts and delta.dim() == 3 else delta.flatten(1)[None]
