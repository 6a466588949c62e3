"""One compiled graph for each adapter state, and no graph breaks."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.laws.cases import EACH_CASE, TELLING, Combination, SamePadConv2d, train
from tests.laws.special_models import SPECIAL
from tests.laws.test_experts import MODELS, NAMES, adapted, assert_near, mixture
from tests.laws.test_mixed_batch import BATCHED, layer_with_three, mixed, names_for
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.hotswap import hotswap_adapter_from_state_dict
from veneer.layers import LoraLayer, wrap
from veneer.routing import BASE
from veneer.testing.laws import close


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


def is_telling(made: Combination) -> bool:
    """Whether the case's layer may make another graph than the others of its type."""
    return made.case.name in TELLING or type(made.case.base()).__module__ == SamePadConv2d.__module__


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(p.values[0], id=p.id, marks=() if is_telling(p.values[0]) else pytest.mark.slow)
        for p in EACH_CASE
        if not p.id.startswith(("Conv1d", "Conv3d"))
    ],
)
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


def two_adapters(r: int = 3) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8, bias=False))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1", "3"]), "a").eval()
    model.add_adapter("b", LoraConfig(r=r, lora_alpha=4, target_modules=["1", "3"]))
    for name in ("a", "b"):
        train(model, name, seed=ord(name))
    return model


def test_going_back_to_an_adapter_compiles_nothing() -> None:
    model, x, counter = two_adapters(), torch.randint(0, 11, (2, 5)), Counter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for number, name in enumerate("abab"):
        model.set_adapter(name)
        assert_close(compiled(x), model(x))
        assert counter.graphs == min(number + 1, 2)


def test_another_strength_compiles_nothing() -> None:
    model, x, counter = two_adapters(), torch.randint(0, 11, (2, 5)), Counter()
    model.set_adapter(["a", "b"])
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def scaled_by_hand() -> None:
        layers[1].scaling["a"] = 0.25
        layers[2].scaling.update(a=0.125, b=3.0)

    changes = [
        lambda: model.set_strength("a", 1.0),
        lambda: model.set_strength("a", 0.5),
        lambda: model.set_strength("b", 0.0),
        lambda: [layer.scale_layer(2.0) for layer in layers],
        lambda: layers[2].scale_layer(0.3),
        scaled_by_hand,
        lambda: [layer.unscale_layer() for layer in layers],
    ]
    seen = []
    for change in changes:
        change()
        seen.append(compiled(x))
        assert_close(seen[-1], model(x))
    assert counter.graphs == 1
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[-2], seen[-1])


@pytest.mark.parametrize("merged", [False, True])
def test_contexts_cost_one_graph_and_other_threads_none(merged: bool) -> None:
    model, x, counter = two_adapters(), torch.randint(0, 11, (2, 5)), Counter()
    model.set_adapter(["a", "b"])
    if merged:
        model.merge_adapter()
    expected = model(x)
    with model.disable_adapter():
        plain = model(x)
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def elsewhere() -> torch.Tensor:
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(compiled(x)))
        thread.start()
        thread.join()
        return found[0]

    assert_close(compiled(x), expected)
    for number in range(3):
        with model.disable_adapter():
            assert_close(compiled(x), plain)
            seen = counter.graphs
            assert_close(elsewhere(), expected)
            assert_close(compiled(x), plain)
        with model.disable_adapter(), torch.no_grad():
            assert_close(compiled(x), plain)
        assert_close(compiled(x), expected)
        if number == 0:
            assert seen == 2
            first = counter.graphs
    assert counter.graphs == first == 3  # without gradients it is another graph


#: Ten batches of four rows.
COMPOSITIONS = [
    list(names) for names in itertools.islice(itertools.product(("a", "b", BASE), repeat=4), 0, 80, 8)
]


@pytest.mark.parametrize("backend", ["counted", pytest.param("inductor", marks=pytest.mark.slow)])
def test_another_mixed_batch_compiles_nothing(backend: str) -> None:
    assert len({tuple(names) for names in COMPOSITIONS}) == 10
    model, plain, x = two_adapters(), two_adapters(), torch.randint(0, 11, (4, 5))
    counter = Counter()
    # Compilers look at what each module of a Sequential does by itself: one module is one graph.
    whole = Whole(model.get_base_model())
    model.base_model.model = whole
    model.compile(backend=counter if backend == "counted" else backend, fullgraph=True)
    with torch.no_grad():
        model(x, adapter_names=COMPOSITIONS[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for names in COMPOSITIONS:
                assert_close(model(x, adapter_names=names), plain(x, adapter_names=names))
            model.set_strength("a", 0.3)
            plain.set_strength("a", 0.3)
            assert_close(model(x, adapter_names=names), plain(x, adapter_names=names))
    assert counter.graphs == (backend == "counted")


def gradients(model: PeftModel, output: torch.Tensor) -> list[torch.Tensor]:
    """Of all adapters."""
    own = [p for name in model.peft_config for p in model.base_model.index.parameters(name)]
    found = torch.autograd.grad(output.float().square().sum(), own, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]


@pytest.mark.parametrize("kind", ["tokens", "tokens-tied", "tokens-of-a-head"])
def test_another_mixed_batch_of_trained_tokens_compiles_nothing(kind: str) -> None:
    case, x, counter = SPECIAL[kind], SPECIAL[kind].x(), Counter()
    torch.manual_seed(0)
    model = get_peft_model(case.build(), LoraConfig(r=2, **case.options), "a").eval()
    model.add_adapter("b", LoraConfig(r=3, **case.second))
    for name in ("a", "b"):
        train(model, name, seed=ord(name))
        for parameter in model.base_model.index.parameters(name):
            parameter.requires_grad_(True)
    plain = copy.deepcopy(model)
    model.compile(backend=counter, fullgraph=True)
    batches = [[*names, BASE] for names in COMPOSITIONS]
    model(x, adapter_names=batches[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for names in batches:
            mine, theirs = model(x, adapter_names=names), plain(x, adapter_names=names)
            assert_close(mine, theirs)
            for one, other in zip(gradients(model, mine), gradients(plain, theirs), strict=True):
                assert_close(one, other)
    assert counter.graphs == 1


class Between(nn.Module):
    """A mixture between two layers, all inside a model."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer: Any = mixture(kind).model.layers[0]
        self.layer = nn.Module()
        self.layer.q_proj, self.layer.last = nn.Linear(16, 16), nn.Linear(16, 5)
        self.layer.mlp = layer.feed_forward if kind == "Llama4" else layer.mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (rows, tokens, 16) -> (rows, tokens, 5)."""
        layer: Any = self.layer
        x = layer.q_proj(x)
        y = layer.mlp(x)
        y = y[0] if isinstance(y, tuple) else y
        return layer.last(x + y.view_as(x))  # type: ignore[no-any-return]


# torch warns so of every graph that begins with an activation.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in ("Mixtral", "Llama4") else pytest.mark.slow) for kind in MODELS],
)
def test_another_mixed_batch_over_experts_compiles_nothing(kind: str) -> None:
    """The mixture itself runs between two graphs, as it is."""
    model, counter, x = adapted(Between(kind)), Counter(), torch.randn(5, 6, 16)
    for name in model.peft_config:
        for parameter in model.base_model.index.parameters(name):
            parameter.requires_grad_(True)
    plain = copy.deepcopy(model)
    model.compile(backend=counter)
    model(x, adapter_names=NAMES)
    with torch.compiler.set_stance("fail_on_recompile"):
        for names in (NAMES, NAMES[2:] + NAMES[:2], ["attention"] * 5):
            mine, theirs = model(x, adapter_names=names), plain(x, adapter_names=names)
            assert_near(mine, theirs)
            for one, other in zip(gradients(model, mine), gradients(plain, theirs), strict=True):
                assert (one - other).norm() <= 1e-5 * other.norm()
    assert counter.graphs == 2
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_mixed_batches_of_other_sizes_are_one_graph_each() -> None:
    model, plain, counter = two_adapters(), two_adapters(), Counter()
    model.base_model.model = Whole(model.get_base_model())
    model.compile(backend=counter, fullgraph=True)
    sizes = (4, 6, 3, 6)
    with torch.no_grad():
        for size in sizes:
            x, names = torch.arange(size * 5).view(size, 5) % 11, (["a", BASE, "b"] * 2)[:size]
            assert_close(model(x, adapter_names=names), plain(x, adapter_names=names))
    assert counter.graphs <= len(set(sizes))


class Whole(nn.Module):
    """A model with one forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_other_weights_of_the_same_shape_compile_nothing() -> None:
    model, other, counter = two_adapters(), two_adapters(), Counter()
    x = torch.randint(0, 11, (2, 5))
    train(other, "a", seed=9)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    names = [key for key in model.state_dict() if ".a." in key or key.endswith(".a")]
    given = {key: value for key, value in other.state_dict().items() if key in names}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1", "3"])
    hotswap_adapter_from_state_dict(model, given, "a", config)
    with torch.compiler.set_stance("fail_on_recompile"):
        swapped = compiled(x)
    assert_close(swapped, model(x))
    other.set_strength("a", 0.5)  # the other's alpha is half of it
    assert_close(swapped, other(x))


COMPILED = [
    p
    for p in BATCHED
    if p.values[0].case.name in ("plain", "no-bias", "3-D", "padding", "lora-bias", "stride-padding")
    and (p.values[0].variant, p.values[0].backend, p.values[0].dtype) == ("plain", "dense", torch.float32)
]


@pytest.mark.parametrize("made", COMPILED)
def test_rows_of_a_compiled_layer_are_those_of_the_plain_one(made: Combination) -> None:
    layer, x = layer_with_three(made), made.x()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    names = names_for(x)
    with mixed(layer, names), torch.no_grad():
        close(compiled(x), layer(x), made)
