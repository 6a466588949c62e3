"""What the forward of a model takes, in which mode it runs, and the logits that it gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from veneer.adapters import base_of

#: The label of a token that no loss falls on, as in torch and transformers.
IGNORED = -100


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training or evaluation mode; the modes are restored afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def bare(model: Any) -> Any:
    """The base model, without `PeftModel` and DistributedDataParallel around it."""
    return base_of(getattr(model, "module", model))


def takes(model: Any, name: str) -> bool:
    return name in inspect.signature(bare(model).forward).parameters


def without_cache(model: Any) -> dict[str, bool]:
    """``use_cache=False`` for models that have it.

    Training never reads a cache, and with one transformers takes packed rows for one sequence.
    """
    return {"use_cache": False} if takes(model, "use_cache") else {}


def answer_logits(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Call a language model, with logits only where some row has a label.

    Args:
        model: A causal language model, adapted or not; also inside a data-parallel wrapper.
        inputs: What it is called with.
        labels: (rows, length).

    Returns:
        The logits (rows, places, vocabulary), and which places of ``labels[:, 1:]`` they predict, ascending.
    """
    places = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    if takes(model, "logits_to_keep"):
        return model(**inputs, logits_to_keep=places).logits, places
    output = model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits[:, places], places
