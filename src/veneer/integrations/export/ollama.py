"""Ollama: a Modelfile beside the files that its ADAPTER line names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...wording import listed
from .base import Part, Problem
from .folding import Rules
from .peft_files import FILES, PeftFiles
from .source import Source

#: The only modules whose names it knows.
KNOWN = re.compile(r"(model\.)?model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
#: The families that it converts adapters of, by the model's type.
FAMILIES = ("llama", "gemma2")
MODELFILE = "Modelfile"


class Ollama(PeftFiles):
    """Ollama's ``ADAPTER``: adapters of Llama and Gemma 2, read with a whole-numbered alpha.

    It tells A from B turned round by which side is longer, so no rank may exceed a side.
    """

    name = "ollama"
    reader = "Ollama's ADAPTER"
    rules = Rules("integer", one_rank=False)
    files = (*FILES, MODELFILE)

    def more_problems(self, source: Source) -> list[Problem]:
        """Other modules, other families, ranks above a side."""
        found = []
        special = source.features()
        named = {
            path for key in ("embedding", "conv", "attention", "experts") for path in special.get(key, ())
        }
        unknown = [p for p in source.updates if not KNOWN.fullmatch(p) and p not in named]
        if unknown:
            found.append(Problem(f"updates of modules other than the layers' projections: {listed(unknown)}"))
        wide = [path for path, u in source.updates.items() if u.r > min(u.a.shape[1], u.b.shape[0])]
        if wide:
            found.append(
                Problem(
                    f"ranks above a side of the weight, where it takes A for its transpose: {listed(wide)}"
                )
            )
        kind = source.base_config().get("model_type")
        if kind is not None and kind not in FAMILIES:
            found.append(
                Problem(f"a base of the type {kind}; it converts adapters of {' and '.join(FAMILIES)}")
            )
        return found

    def rank_of(self, a: Tensor, values: Mapping[str, Any]) -> int:
        return int(a.shape[0])

    def notes(self, source: Source) -> list[str]:
        """A base that is not here."""
        found = []
        if not source.base_config():
            found.append(
                f"Ollama converts adapters of {' and '.join(FAMILIES)} only; the base is not there to check"
            )
        if not Path(source.base_name()).is_dir():
            found.append(f"in the Modelfile, put what Ollama calls {source.base_name()} after FROM")
        return found

    def write(self, parts: list[Part], place: Path) -> None:
        """The adapter's files and the Modelfile; a base on this disk is named by its directory."""
        super().write(parts, place)
        base = Path(parts[0].source.base_name())
        named = base.resolve() if base.is_dir() else base
        (place / MODELFILE).write_text(f'FROM "{named}"\nADAPTER .\n', encoding="utf-8")

    def usage(self, place: Path, parts: list[Part]) -> str:
        return f"ollama create NAME -f {shlex.quote(str(place / MODELFILE))}"
