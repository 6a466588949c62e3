"""SGLang: PEFT's format, factors alone, one rank and one strength."""

from __future__ import annotations

import shlex

from torch import Tensor

from ...expert_layouts.layouts import LAYOUTS
from .base import Part, Problem
from .experts import one_by_one
from .folding import Rules
from .peft_files import PeftFiles
from .source import Source


class Sglang(PeftFiles):
    """SGLang's ``--lora-paths``, which reads ``lora_alpha / r`` and no patterns."""

    name = "sglang"
    reader = "SGLang, --lora-paths"
    rules = Rules("integer")

    def prepared(self, source: Source) -> tuple[Source, dict[str, Tensor], list[Problem]]:
        """The adapter with an update for every expert."""
        made, problems = one_by_one(source, LAYOUTS["sglang"])
        return made, {}, problems

    def usage(self, place: object, parts: list[Part]) -> str:
        """The server's command line."""
        base = shlex.quote(parts[0].source.base_name())
        adapter = shlex.quote(f"NAME={place}")
        return f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {adapter}"
