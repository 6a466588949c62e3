"""Covariances of the inputs of layers, for CorDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from veneer import backends
from veneer.calibration.measuring import cached, observe, options, planned
from veneer.config import CordaConfig, LoraConfig
from veneer.errors import ConfigError
from veneer.forward import in_mode
from veneer.inits import note_statistics
from veneer.inits.corda import ContextDirections, context_directions
from veneer.inject.injection import Addition

_PARTS = ("S_WC", "U_WC", "V_WC")


class _Covariance:
    """The sum of ``xᵀx`` over the calls of one layer, each call's x divided by its largest value."""

    def __init__(self, path: str, addition: Addition, half: bool) -> None:
        self.path, self.addition, self.half = path, addition, half
        self.total: Tensor | None = None
        self.calls = 0

    def add(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """Add one call's input."""
        if not args or not isinstance(args[0], Tensor):
            raise ConfigError(f"{self.path} was called without a tensor as its first argument")
        rows = self.addition.layer.rows(args[0].detach())
        if rows.numel() == 0:
            return
        rows = rows if self.half else rows.float()
        largest = rows.max().abs()
        rows = rows / torch.where(largest > 0, largest, rows.abs().max().clamp_min(1e-12))
        covariance = rows.T @ rows
        if not bool(covariance.isfinite().all()):
            raise ConfigError(
                f"the inputs of {self.path} have values that are not finite (or overflow with "
                "use_float16_for_covariance)"
            )
        self.total = covariance if self.total is None else self.total + covariance
        self.calls += 1


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure the statistics of ``init_lora_weights="corda"`` for the next `get_peft_model` on this model.

    The covariances of all layers' inputs are in memory at once, (in, in) float32 each. Until the adapter is
    added, only r singular values and vectors per layer are kept. The model is not changed.

    Args:
        model: The base model.
        lora_config: Configuration of the adapter. Its ``corda_config`` may name a ``covariance_file`` and a
            ``cache_file``: each is read if it exists, and written if not.
        run_model: Runs the model on samples of its future inputs; 256 samples of 2048 tokens are enough for
            4096 features.
        hooked_model: Measure this model's layers of the same names instead.

    Raises:
        ConfigError: If nothing was run, a layer was not reached, inputs are not finite, or a file does not
            match the model.
        TargetError: If a layer cannot start this way.
    """
    chosen: CordaConfig = options(lora_config, "corda", CordaConfig)
    additions = planned(model, lora_config)
    names = [f"{path}.eigens.{part}" for path in additions for part in _PARTS]

    def measure() -> dict[str, Tensor]:
        covariances = cached(
            chosen.covariance_file,
            list(additions),
            lambda: _covariances(model, lora_config, additions, run_model, hooked_model),
        )
        return _eigens(additions, covariances, chosen.corda_method)

    found = cached(chosen.cache_file, names, measure)
    for path, addition in additions.items():
        s, u, v = (found[f"{path}.eigens.{part}"] for part in _PARTS)
        note_statistics(addition.site.base, ContextDirections(u, s, v))


def _eigens(
    additions: Mapping[str, Addition], covariances: dict[str, Tensor], method: str
) -> dict[str, Tensor]:
    result = {}
    for path, addition in additions.items():
        base, layer = addition.site.base, addition.layer
        weight = layer.to_matrix(backends.find(base).read(base))
        try:
            found = context_directions(weight, covariances.pop(path), addition.spec.r, method)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        for part, tensor in zip(_PARTS, (found.s, found.u, found.v), strict=True):
            result[f"{path}.eigens.{part}"] = tensor
    return result


def _covariances(
    model: nn.Module,
    config: LoraConfig,
    additions: Mapping[str, Addition],
    run_model: Callable[[], None] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    if run_model is None:
        raise ConfigError(
            "CorDA measures the inputs of layers: pass run_model, a function that runs the model on samples, "
            "or name an existing file as corda_config.covariance_file or cache_file"
        )
    half = options(config, "corda", CordaConfig).use_float16_for_covariance
    measured = additions if hooked_model is None else planned(hooked_model, config)
    sums = {path: _Covariance(path, addition, half) for path, addition in measured.items()}
    with in_mode(hooked_model or model, False):
        observe({a.site.module: sums[path].add for path, a in measured.items()}, run_model)
    result = {path: sums[path].total for path in additions if path in sums}
    if unseen := [path for path in additions if result.get(path) is None]:
        raise ConfigError(
            f"run_model did not reach {len(unseen)} of {len(additions)} layers, for example "
            f"{', '.join(unseen[:3])}: run the model itself on samples with tokens in them"
        )
    return {path: total / sums[path].calls for path, total in result.items() if total is not None}
