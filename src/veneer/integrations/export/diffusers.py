"""diffusers: one file for all parts of a pipeline, no configuration beside it."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import ConfigError, Hint
from .base import Part, Target
from .folding import Rules
from .options import COMPONENTS, DIFFUSERS_FILE
from .peft_files import factors
from .source import Source, Update

_PATHS = {
    "unet": re.compile(r"(down_blocks|mid_block|up_blocks)\..*"),
    "transformer": re.compile(r"(single_)?transformer_blocks\..*"),
    "text_encoder": re.compile(r"(text_model\.)?encoder\.layers\..*"),
}


class Diffusers(Target):
    """``pipeline.load_lora_weights``: names begin with the pipeline's part.

    The file says neither rank nor alpha: readers take the rank from the factors and a strength of 1. With
    several ranks in one file some releases scale wrongly, so there is one.
    """

    name = "diffusers"
    reader = "diffusers' load_lora_weights"
    rules = Rules("rank")
    keeps = frozenset({"conv", "dora", "lora_bias"})
    files = (DIFFUSERS_FILE,)

    def component(self, source: Source, given: str | None) -> str:
        """The one named, else the one whose modules have such paths."""
        if given is not None:
            return given
        for name, pattern in _PATHS.items():
            if any(pattern.fullmatch(path) for path in source.updates):
                return name
        raise ConfigError(
            f"which part of a pipeline {source.directory} belongs to cannot be told from paths such as "
            f"{next(iter(source.updates))}: pass ",
            Hint("component", COMPONENTS[0]),
            f" or another of {', '.join(COMPONENTS)}",
        )

    def write(self, parts: list[Part], place: Path) -> None:
        """The one file."""
        tensors: dict[str, Tensor] = {}
        for part in parts:
            tensors |= factors(part.folded.updates, f"{part.component}.")
        save_file(
            {k: t.contiguous() for k, t in tensors.items()}, place / DIFFUSERS_FILE, metadata={"format": "pt"}
        )

    def read(self, place: Path) -> dict[str, dict[str, Update]]:
        """As diffusers does: everything from names and shapes."""
        found: dict[str, dict[str, dict[str, Tensor]]] = {}
        for name, tensor in load_file(place / DIFFUSERS_FILE).items():
            component, _, rest = name.partition(".")
            path, _, role = rest.rpartition(".lora_")
            found.setdefault(component, {}).setdefault(path, {})[role] = tensor
        return {
            component: {
                path: Update(
                    parts["A.weight"],
                    parts["B.weight"],
                    1.0,
                    bias=parts.get("B.bias"),
                    magnitude=parts.get("magnitude_vector"),
                )
                for path, parts in modules.items()
            }
            for component, modules in found.items()
        }

    def usage(self, place: object, parts: list[Part]) -> str:
        return f"pipeline.load_lora_weights({str(place)!r})"
