"""vLLM: PEFT's format, factors alone."""

from __future__ import annotations

import shlex
from types import MappingProxyType

from ...wording import listed
from .base import Part, Problem
from .folding import Rules
from .peft_files import PeftFiles
from .source import Source

#: Heads of classifiers, the only modules that may be whole.
HEADS = ("classifier", "score")


class Vllm(PeftFiles):
    """vLLM's ``--lora-modules`` and ``LoRARequest``.

    Releases differ in whether they read the patterns of ranks and strengths, and an older one ignores them
    without a word: they are always folded.
    """

    name = "vllm"
    reader = "vLLM, --lora-modules and LoRARequest"
    rules = Rules("integer", rslora=True)
    keeps = frozenset({"embedding", "head"})
    sometimes = MappingProxyType({"modules_to_save": "a classifier's head only"})

    def more_problems(self, source: Source) -> list[Problem]:
        """Whole modules other than a classifier's head."""
        names = source.others.get("modules_to_save", {})
        other = [name for name in names if name.split(".")[-2] not in HEADS]
        if not other:
            return []
        return [Problem(f"modules trained whole, other than {' and '.join(HEADS)}: {listed(other)}")]

    def notes(self, source: Source) -> list[str]:
        """What vLLM needs to be told."""
        rank = max(update.r for update in source.updates.values())
        return [
            f"vLLM takes ranks up to --max-lora-rank, 16 unless told otherwise; this adapter has {rank}"
        ] * (rank > 16)

    def usage(self, place: object, parts: list[Part]) -> str:
        """The server's command line."""
        base, r = shlex.quote(parts[0].source.base_name()), parts[0].folded.r
        module = shlex.quote(f"NAME={place}")
        return f"vllm serve {base} --enable-lora --max-lora-rank {r} --lora-modules {module}"
