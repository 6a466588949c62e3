"""What the layouts leave to the base model: the order of its halves, and what it calls its experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

#: Model types whose experts were called w1, w3 and w2 in transformers 4, in a block of another name.
NUMBERED = ("minimax", "minimax_m2", "mixtral")
#: Those whose stacks are (experts, in, out), and those in which gate and up alternate row by row.
TRANSPOSED = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")
#: Those that have such stacks, too, where PEFT takes them for (experts, out, in).
AS_STORED = ("llama4", "llama4_text")
INTERLEAVED = ("gpt_oss", "openai_privacy_filter")
#: Those whose experts vLLM loads as stacks, with what stands for them in the names of models.
STACKED_IN_VLLM = ("gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe")


class Mixture(NamedTuple):
    """A kind of base model.

    Attributes:
        known: Whether anything says which base it is.
        numbered: Whether its projections were called w1, w3 and w2.
        transposed: Whether its stacks are (experts, in, out).
        interleaved: Whether gate and up alternate in ``gate_up_proj``; otherwise one follows the other.
        stacked_in_vllm: Whether vLLM loads its experts as stacks.
        as_stored: Whether its stacks are (experts, in, out), which PEFT takes for (experts, out, in).
    """

    known: bool = False
    numbered: bool = False
    transposed: bool = False
    interleaved: bool = False
    stacked_in_vllm: bool = False
    as_stored: bool = False


def mixture_of(base: Mapping[str, Any], name: str | None) -> Mixture:
    """The kind of a base model, from its ``config.json``, or without one from its name.

    Args:
        base: The content of its ``config.json``, or nothing.
        name: What the adapter's configuration calls it.
    """
    found = base.get("model_type")
    if isinstance(found, str):
        inside = base.get("text_config")
        types = {found, inside.get("model_type") if isinstance(inside, Mapping) else None}
        return Mixture(True, *(not types.isdisjoint(kinds) for kinds in _KINDS))
    if not name:
        return Mixture()
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return Mixture(True, *(any(kind.replace("_", "") in plain for kind in kinds) for kinds in _KINDS))


_KINDS = (NUMBERED, TRANSPOSED, INTERLEAVED, STACKED_IN_VLLM, AS_STORED)
