"""llama.cpp: the files that its converter to GGUF reads; it stops at names that it does not know."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...wording import listed
from .base import Part, Problem
from .folding import Rules
from .peft_files import PeftFiles
from .source import Source

#: Parts of names that the converter takes for norms, and keeps.
NORMS = ("_layernorm", ".norm")


class LlamaCpp(PeftFiles):
    """llama.cpp's ``convert_lora_to_gguf.py``.

    It writes one alpha of 32 bits; every update is scaled by alpha over the rank of its own factors. rsLoRA
    and patterns of strengths it ignores without a word.
    """

    name = "llama.cpp"
    reader = "llama.cpp's convert_lora_to_gguf.py"
    rules = Rules("float32", one_rank=False)
    keeps = frozenset({"embedding"})
    sometimes = MappingProxyType({"head": "where the base does not tie it", "modules_to_save": "norms only"})

    def more_problems(self, source: Source) -> list[Problem]:
        """Whole modules that are no norms, and a head that the converted model has not got."""
        names = source.others.get("modules_to_save", {})
        other = [name for name in names if not any(norm in name for norm in NORMS)]
        found = [Problem(f"modules trained whole, other than norms: {listed(other)}")] * bool(other)
        heads = source.features().get("head")
        if heads and source.base_config().get("tie_word_embeddings"):
            found.append(
                Problem(f"an update of {listed(heads)}, whose weight is the embedding's in this base")
            )
        return found

    def rank_of(self, a: Tensor, values: Mapping[str, Any]) -> int:
        return int(a.shape[0])

    def notes(self, source: Source) -> list[str]:
        """A head of a base that is not here."""
        if "head" in source.features() and not source.base_config():
            return [
                "the converter takes an update of lm_head only where the base has a weight of its own for it"
            ]
        return []

    def usage(self, place: object, parts: list[Part]) -> str:
        base = shlex.quote(parts[0].source.base_name())
        return f"python convert_lora_to_gguf.py {shlex.quote(str(place))} --base-model-id {base}"
