"""vLLM: PEFT's format, factors alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...expert_layouts.layouts import LAYOUTS
from ...wording import listed
from .base import Part, Problem, plain_config
from .experts import in_stacks, one_by_one, out_of_stacks, stacks_of
from .folding import Rules
from .peft_files import PeftFiles
from .source import Source, Update

#: What its server takes for ``--max-lora-rank``.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
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
    keeps = frozenset({"embedding", "head", "tied"})
    sometimes = MappingProxyType({"modules_to_save": "a classifier's head only"})

    def prepared(self, source: Source) -> tuple[Source, dict[str, Tensor], list[Problem]]:
        """The adapter with an update for every expert."""
        made, problems = one_by_one(source, LAYOUTS["vllm"])
        return made, {}, problems

    def config(self, part: Part) -> dict[str, Any]:
        """With the stacks of experts."""
        return plain_config(part, target_parameters=sorted(stacks_of(part.folded.updates)) or None)

    def laid_out(self, updates: Mapping[str, Update]) -> Mapping[str, Update]:
        """With the experts in stacks, for the models whose experts it loads as such."""
        return in_stacks(updates)

    def apart(self, updates: dict[str, Update], r: int) -> dict[str, Update]:
        """With an update for every expert of a stack."""
        return out_of_stacks(updates, r)

    def more_problems(self, source: Source) -> list[Problem]:
        """Whole modules other than a classifier's head, and ranks above the largest that it takes."""
        wide = [path for path, update in source.updates.items() if update.r > RANKS[-1]]
        found = [Problem(f"ranks above {RANKS[-1]}: {listed(wide)}")] * bool(wide)
        names = source.others.get("modules_to_save", {})
        other = [name for name in names if name.split(".")[-2] not in HEADS]
        if other:
            found.append(Problem(f"modules trained whole, other than {' and '.join(HEADS)}: {listed(other)}"))
        return found

    def notes(self, source: Source) -> list[str]:
        """What vLLM needs to be told."""
        rank = max(update.r for update in source.updates.values())
        note = f"vLLM takes ranks up to --max-lora-rank, by default 16; this adapter has {rank}"
        return [note] * (rank > 16)

    def usage(self, place: object, parts: list[Part]) -> str:
        """The server's command line."""
        base = shlex.quote(parts[0].source.base_name())
        r = next(rank for rank in RANKS if rank >= parts[0].folded.r)
        module = shlex.quote(f"NAME={place}")
        # What `vllm serve` runs; vLLM's builds of other names lack that command.
        server = f"python -m vllm.entrypoints.openai.api_server --model {base}"
        return f"{server} --enable-lora --max-lora-rank {r} --lora-modules {module}"
