"""Strengths: floats that anybody may write, each beside a tensor with the same value."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from veneer.layers.strengths import Strengths


def values(strengths: Strengths) -> dict[str, float]:
    return {name: float(tensor) for name, tensor in strengths.tensors.items()}


def test_every_way_of_writing_reaches_the_tensors() -> None:
    held = Strengths(a=1.0)
    held["b"] = 0.5
    held.update({"a": 2.0}, c=4.0)
    held.setdefault("d", 8.0)
    held |= {"e": 16.0}
    assert held.pop("b") == 0.5 and held.pop("b", None) is None
    del held["c"]
    assert dict(held) == values(held) == {"a": 2.0, "d": 8.0, "e": 16.0}
    assert isinstance(held, dict) and held.popitem()[0] not in held.tensors
    held.clear()
    assert not held and not held.tensors


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_their_own(copied: object) -> None:
    held = Strengths(a=0.5)
    assert callable(copied)
    other = copied(held)
    assert type(other) is Strengths and values(other) == {"a": 0.5}
    other["a"] = 2.0
    assert held["a"] == 0.5 and values(held) == {"a": 0.5} and values(other) == {"a": 2.0}


def test_tensors_made_in_inference_mode_serve_outside_of_it() -> None:
    with torch.inference_mode():
        held = Strengths(a=0.5)
    assert not held.tensors["a"].is_inference()
