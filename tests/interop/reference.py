"""The reference library, imported once, and what every test against it does with an adapter.

Its own warnings are about its own limits (merging grouped convolutions, embeddings saved along) and are left
out where they are expected; what it says about *our* files is an error unless a test expects it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

with warnings.catch_warnings():
    # It imports whatever else is installed (torchao, bitsandbytes), which deprecates this and that.
    warnings.simplefilter("ignore")
    import peft

import veneer
from veneer.files.layout import SAFETENSORS_NAME

__all__ = ["both", "expect_same_model", "from_reference", "output", "peft", "quiet", "randomise", "stored"]


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the reference says about itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        yield


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every trainable parameter away from its start, by its name, the same in both libraries."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(seed + sum(name.encode()))
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data.copy_(0.3 * value)
    return model


@torch.no_grad()
def output(model: nn.Module, inputs: Any) -> Tensor:
    """What the model says to its inputs: logits, hidden states or a plain tensor."""
    result = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(result, Tensor):
        return result
    names = ("logits", "start_logits", "last_hidden_state")
    return next(result[name] for name in names if result.get(name) is not None)


def stored(place: Path) -> dict[str, Tensor]:
    """The tensors in an adapter's directory."""
    return load_file(place / SAFETENSORS_NAME)


def expect_same_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, (name, ours[name].dtype, tensor.dtype)
        assert torch.equal(ours[name], tensor), name


def expect_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """The same names in memory, of the base and of the adapter, with the same bits."""
    expect_same_tensors(ours.state_dict(), theirs.state_dict())


def both(
    build: Callable[[], nn.Module], options: Mapping[str, Any], adapter: str = "default"
) -> tuple[veneer.PeftModel, Any]:
    """The same model with the same fresh configuration in both libraries, ours first."""
    base = build().eval()
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**options), adapter)
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options), adapter)
    return ours.eval(), theirs.eval()


def from_reference(base: nn.Module, place: Path, **kwargs: Any) -> Any:
    """An adapter's directory, opened by the reference on a copy of the base."""
    with warnings.catch_warnings():
        for known in (
            "LoRA adapter added to ConvNd layer with groups > 1",
            ".*ensure_weight_tying",
            "Unsupported layer type",  # PEFT 0.18 of any module with a targeted parameter
            "The following .*_pattern keys did not match any targeted module",  # said of parameters that did
        ):
            warnings.filterwarnings("ignore", known)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(place), **kwargs).eval()
