"""One compiled graph for each adapter state, and no graph breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.laws.cases import EACH_CASE, Combination, train
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.layers import wrap


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("made", [p for p in EACH_CASE if not p.id.startswith(("Conv1d", "Conv3d"))])
def test_every_layer_is_one_graph(made: Combination) -> None:
    layer, x = made.layer(lora_dropout=0.1), made.x()
    counter = Counter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        assert_close(compiled(x), layer(x))
    assert counter.graphs == 1
    layer.train()
    compiled(x)
    compiled(x).float().sum().backward()
    assert counter.graphs <= 2  # an embedding has no dropout, and needs no second one
    assert all(p.grad is not None for p in layer.adapter_parameters("default"))


def states(model: PeftModel) -> Iterator[str]:
    """Put the model into one state after the other."""
    model.set_adapter("a")
    yield "a"
    model.set_adapter("b")
    yield "b"
    model.set_adapter(["a", "b"])
    yield "both"
    model.merge_adapter(["b"])
    yield "one merged"
    model.unmerge_adapter()
    model.merge_adapter()
    yield "merged"
    model.base_model.disable_adapter_layers()
    yield "merged and disabled"
    model.unmerge_adapter()
    yield "disabled"


def test_a_model_is_one_graph_in_each_state() -> None:
    base = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1", "3"]), "a").eval()
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=4, target_modules=["1", "3"]))
    for name in ("a", "b"):
        train(model, name, seed=ord(name))
    x = torch.randint(0, 11, (2, 5))
    counter = Counter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for state in states(model):
        before = counter.graphs
        for _ in range(2):
            assert_close(compiled(x), model(x))
        # States that compute alike share a graph: "one merged" leaves "a" as the only branch.
        assert counter.graphs <= before + 1, state
    # Once merged, a layer has a place for its undo: its states may be compiled once more, then no more.
    for round_number in range(2):
        seen = counter.graphs
        model.base_model.enable_adapter_layers()
        for state in states(model):
            assert_close(compiled(x), model(x))
            assert counter.graphs == seen or round_number == 0, state


def test_new_values_of_the_factors_need_no_new_graph() -> None:
    layer = wrap(nn.Linear(6, 5), LoraConfig(r=2, lora_alpha=6))
    counter = Counter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for seed in range(3):
        train(layer, "default", seed)
        x = torch.randn(4, 6)
        assert_close(compiled(x), layer(x))
    assert counter.graphs == 1
