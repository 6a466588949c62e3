"""Ways out of a refusal: what can be written instead, and whether merging is one of them."""

from __future__ import annotations

from ...errors import Blank, Hint, Text
from .source import Source

#: Feature -> a way out other than merging.
WAYS = {
    "dora": Text(
        Hint("dora_to_plain", True),
        " and ",
        Hint("rank", Blank("N")),
        " with the base model convert DoRA to plain LoRA by a truncated SVD, and report its error",
    ),
    "lora_bias": Text("the target plain, given the base model, adds it to the layers' own biases"),
}

MERGED = "makes a plain model of the adapter and its base, which every program reads"
MERGE = f"`veneer merge` {MERGED}"
MERGE_UNTIED = f"`veneer merge --untie` {MERGED}"


def merging(source: Source) -> str | None:
    """How a plain model is made of an adapter and its base; None where `veneer merge` refuses the adapter."""
    features, ties = source.features(), source.base_ties()
    conditions = []
    if source.config.alora_invocation_tokens:
        return None
    if biased := features.get("lora_bias"):
        if source.base is None:
            conditions.append("if every layer with a bias of B has one of its own")
        elif any(source.base.tensor(path, "bias") is None for path in biased):
            return None
    alone = "tied" not in features and ("embedding" in features or "head" in features)
    if alone and ties is None:
        conditions.append("`veneer merge --untie` if the base ties embedding and head")
    made = MERGE_UNTIED if "layer_replication" in features or (alone and ties) else MERGE
    return f"{made} ({', '.join(conditions)})" if conditions else made
