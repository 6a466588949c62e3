"""Configurations inside the configuration: options of single initialisations, and of the running process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from veneer.config import values as check
from veneer.config.spelling import unknown_options
from veneer.errors import Hint, Text


@dataclass
class LoftQConfig:
    """Options of ``init_lora_weights="loftq"``.

    Args:
        loftq_bits: Bits of the quantised base weight: 2, 4 or 8.
        loftq_iter: Rounds of quantise-then-factorise; at least 1.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def _problems(self) -> list[Text]:
        return [
            *check.choice("loftq_config.loftq_bits", self.loftq_bits, (2, 4, 8)),
            *check.count("loftq_config.loftq_iter", self.loftq_iter),
        ]


@dataclass
class LoraRuntimeConfig:
    """Options of the running process; never written to a file.

    Args:
        ephemeral_gpu_offload: Accepted, without effect.
    """

    ephemeral_gpu_offload: bool = False

    def _problems(self) -> list[Text]:
        return check.flag("runtime_config.ephemeral_gpu_offload", self.ephemeral_gpu_offload)


@dataclass
class EvaConfig:
    """Options of ``init_lora_weights="eva"``.

    Args:
        rho: The rank of a layer may grow to ``rho * r``; at least 1.
        tau: Cosine similarity of successive singular vectors above which a layer has converged, in [0, 1].
        use_label_mask: Ignore positions whose label is ``label_mask_value``.
        label_mask_value: The label that marks ignored positions.
        whiten: Whiten the singular vectors.
        adjust_scaling_factors: Keep the size of gradients equal when ranks are redistributed.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def _problems(self) -> list[Text]:
        found = []
        if not check.is_number(self.rho) or not 1 <= self.rho <= check.LARGEST_RANK:
            got = f"{check.LARGEST_RANK}, got {check.show(self.rho)}"
            found.append(Text(Hint("eva_config.rho"), f" must be a number from 1 to {got}"))
        found += check.fraction("eva_config.tau", self.tau)
        return found


@dataclass
class CordaConfig:
    """Options of ``init_lora_weights="corda"``: where statistics are cached, which of its two methods."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def _problems(self) -> list[Text]:
        return check.choice("corda_config.corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """Options of ``init_lora_weights="lora_ga"``: which singular vectors of the gradient, how scaled."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def _problems(self) -> list[Text]:
        return [
            *check.choice("lora_ga_config.direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random")),
            *check.choice("lora_ga_config.scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit")),
            *check.count("lora_ga_config.stable_gamma", self.stable_gamma),
        ]


PARTS: dict[str, type[Any]] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "runtime_config": LoraRuntimeConfig,
}


def part(kind: type[Any], value: Any) -> Any:
    """A part of a configuration from its dictionary or from its twin in another library; else unchanged."""
    if isinstance(value, kind):
        return value
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and type(value).__name__ == kind.__name__
    ):
        value = dataclasses.asdict(value)
    if isinstance(value, dict) and set(value) <= {f.name for f in dataclasses.fields(kind)}:
        return kind(**value)
    return value


def part_problem(name: str, kind: type[Any], value: object) -> Text:
    """Why a value is no such part."""
    known = [f.name for f in dataclasses.fields(kind)]
    if isinstance(value, dict):
        unknown = [str(key) for key in value if key not in known]
        return Text(Hint(name), f" has no option {unknown_options(unknown, known)}")
    return Text(Hint(name), f" must be a {kind.__name__} or its dictionary, got {check.show(value)}")
