"""llama.cpp: the files that its converter reads, and its GGUF file where that is installed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...wording import listed
from .base import Part, Problem
from .converter import command, convert, converter
from .folding import Rules
from .peft_files import FILES, PeftFiles
from .source import Source

GGUF = "adapter.gguf"


class LlamaCpp(PeftFiles):
    """llama.cpp's ``convert_lora_to_gguf.py``.

    It writes one alpha of 32 bits; every update is scaled by alpha over the rank of its own factors. rsLoRA
    and patterns of strengths it ignores without a word. Its runtime ignores whole norms.
    """

    name = "llama.cpp"
    reader = "llama.cpp's convert_lora_to_gguf.py"
    files = (*FILES, GGUF)
    rules = Rules("float32", one_rank=False)
    variants = MappingProxyType(
        {
            "alora": "it is an aLoRA, which llama.cpp's server applies from one token before its invocation "
            "on; where that is near enough, give the converter the adapter's own directory"
        }
    )
    sometimes = MappingProxyType(dict.fromkeys(("embedding", "head"), "where the base does not tie them"))

    def more_problems(self, source: Source) -> list[Problem]:
        """An update of a tied weight, which aborts the whole program."""
        names = _embedding_and_head(source)
        if not names or not source.base_ties():
            return []
        return [Problem(f"an update of {listed(names)}, as embedding and head are one weight in this base")]

    def rank_of(self, a: Tensor, values: Mapping[str, Any]) -> int:
        return int(a.shape[0])

    def notes(self, source: Source) -> list[str]:
        """A base that is not here, where it matters."""
        names = _embedding_and_head(source)
        if not names or source.base_ties() is not None:
            return []
        return [
            f"llama.cpp fails on an update of {listed(names)} where the base ties embedding and head, and "
            "the base is not there to check"
        ]

    def write(self, parts: list[Part], place: Path) -> None:
        """The files, and the GGUF file where the converter is on the PATH and the base has a name."""
        super().write(parts, place)
        base = parts[0].source.named_base()
        if base is not None and (program := converter()) is not None:
            convert(program, base, place, place / GGUF)

    def usage(self, place: Path, parts: list[Part]) -> str:
        """The server's command line, or that of the converter where there is no GGUF file yet."""
        if (place / GGUF).is_file():
            return f"llama-server --model BASE.gguf --lora {shlex.quote(str(place / GGUF))}"
        return command(parts[0].source.base_name(), place, place / GGUF)


def _embedding_and_head(source: Source) -> list[str]:
    features = source.features()
    return [*features.get("embedding", ()), *features.get("head", ())]
