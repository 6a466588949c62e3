"""Rows of one batch through different adapters: the same as each adapter by itself, for every layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import ALL, Combination, acting_everywhere, train
from veneer import LoraConfig, get_peft_model
from veneer.layers import LoraLayer, wrap
from veneer.ops import mixed_batch
from veneer.routing import BASE, routed
from veneer.testing.laws import close
from veneer.variants.alora import Activation

#: Cases whose first axis is that of the batch, each with more than one row.
BATCHED = [
    p
    for p in ALL
    if p.values[0].init == "Default"
    and p.values[0].dtype in (torch.float32, torch.bfloat16)
    and p.values[0].case.name not in ("0-D", "1-D", "unbatched", "empty")
]
each = pytest.mark.parametrize("made", BATCHED)


def layer_with_three(made: Combination) -> LoraLayer:
    layer = made.layer()
    for seed, name in enumerate(("second", "third"), start=6):
        wrap(layer, made.config(**{"r": 2 * seed - 6} if "r" not in made.case.options else {}), name)
        train(layer, name, seed)
    return layer


def mixed(layer: LoraLayer, names: list[str]) -> AbstractContextManager[object]:
    """A call whose rows go through these adapters; one that is invoked by a text is invoked everywhere."""
    return routed(layer, names, activation=Activation({}))


def rows_by_themselves(layer: LoraLayer, names: list[str], x: Tensor) -> Tensor:
    """Each row through its own adapter, as the whole batch went through that one."""
    whole = {}
    for name in dict.fromkeys(names):
        layer.enable_adapters(name != BASE)
        layer.set_adapter(name)
        with acting_everywhere():
            whole[name] = layer(x)
    layer.enable_adapters(True)
    return torch.stack([whole[name][row] for row, name in enumerate(names)])


def names_for(x: Tensor) -> list[str]:
    return [("default", BASE, "second", "third")[row % 4] for row in range(x.shape[0])]


@each
def test_each_row_is_what_its_adapter_gives(made: Combination) -> None:
    layer, x = layer_with_three(made), made.x()
    names = names_for(x)
    expected = rows_by_themselves(layer, names, x)
    with mixed(layer, names), torch.no_grad():
        close(layer(x), expected, made)
    with mixed(layer, names):
        close(layer(x), expected, made)


#: What scales gradients by how often a row is looked up counts the rows of one adapter, not of the batch.
DIFFERENTIABLE = [p for p in BATCHED if p.values[0].case.name != "by-frequency"]


@pytest.mark.parametrize("made", DIFFERENTIABLE)
def test_gradients_are_those_of_the_rows(made: Combination) -> None:
    layer, x = layer_with_three(made), made.x()
    if x.is_floating_point():
        x.requires_grad_()
    names = names_for(x)
    for name in layer.held_adapters:
        for parameter in layer.adapter_parameters(name):
            parameter.requires_grad_(True)
    leaves = [p for p in layer.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])

    def gradients(output: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(output.float().square().sum(), leaves, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(leaves, found, strict=True)
        ]
        return dense

    with mixed(layer, names):
        actual = gradients(layer(x))
    layer.train(layer.training)
    by_row = rows_by_themselves_with_grad(layer, names, x)
    for mine, expected in zip(actual, gradients(by_row), strict=True):
        close(mine, expected, made)


def rows_by_themselves_with_grad(layer: LoraLayer, names: list[str], x: Tensor) -> Tensor:
    whole = {}
    for name in dict.fromkeys(names):
        if name == BASE:
            whole[name] = layer.original_base()(x)
        else:
            layer._live = (name,)
            with acting_everywhere():
                whole[name] = layer(x)
    return torch.stack([whole[name][row] for row, name in enumerate(names)])


#: Those whose updates are mere products.
FEW = ("Linear-3-D-Default-plain-dense-float32", "Conv1D-plain-Default-plain-dense-bfloat16")


def bits(tensor: Tensor) -> Tensor:
    """What a tensor is compared by: a zero has a sign, and a NaN equals itself."""
    return tensor.detach().flatten().contiguous().view(torch.uint8)


#: Two adapters with scattered rows, which can be laid together, one with one row, and the base.
OWNERS = ["default", "second", BASE, "second", "third", "default"]


def several_rows(made: Combination) -> Tensor:
    """The case's input, as often as it takes for a row of each owner."""
    x = made.x()
    return torch.cat([x] * -(-len(OWNERS) // x.shape[0]))[: len(OWNERS)].clone()


def everything(layer: LoraLayer, x: Tensor, spoilt: str, value: float) -> dict[str, Tensor]:
    """Outputs and gradients, except those of "second", which gets the value in what ``spoilt`` names."""
    mine = torch.tensor([owner == "second" for owner in OWNERS])
    others = (~mine).nonzero().flatten()
    own = list(layer.adapter_parameters("second"))
    kept = [parameter.detach().clone() for parameter in own]
    x = x.clone()
    with torch.no_grad():
        if "factors" in spoilt:
            for parameter in own:
                parameter.fill_(value)
        if "rows" in spoilt:
            x[mine] = value if x.is_floating_point() else x[mine].flip(0)
    for name in layer.held_adapters:
        for parameter in layer.adapter_parameters(name):
            parameter.requires_grad_(True)
    if x.is_floating_point():
        x.requires_grad_()
    with mixed(layer, OWNERS):
        y = layer(x)
        with torch.no_grad():
            inferred = layer(x)
    outward = torch.linspace(-1, 1, y.numel()).view_as(y).to(y)
    if "gradients" in spoilt:
        outward[mine] = value
    leaves = {f"{n} {i}": p for n in ("default", "third") for i, p in enumerate(layer.adapter_parameters(n))}
    if x.requires_grad:
        leaves["x"] = x
    given = list(layer.adapter_parameters("second"))
    found = torch.autograd.grad(y, [*leaves.values(), *given], outward, allow_unused=True)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), found)}  # noqa: B905
    if "x" in gradients:
        gradients["x"] = gradients["x"][others]
    with torch.no_grad():
        for parameter, before in zip(own, kept, strict=True):
            parameter.copy_(before)
    return {"y": y[others], "inferred": inferred[others], **gradients}


def assert_apart(layer: LoraLayer, x: Tensor) -> None:
    expected = everything(layer, x, "", 0.0)
    nan, inf = float("nan"), float("inf")
    for spoilt, value in (
        ("factors", nan), ("rows", nan), ("gradients", nan), ("rows", inf),
        ("factors rows gradients", inf), ("factors rows gradients", -4.0),
    ):  # fmt: skip
        for name, tensor in everything(layer, x, spoilt, value).items():
            assert torch.equal(bits(tensor), bits(expected[name])), (name, spoilt, value)


@each
def test_one_adapters_values_change_no_bit_of_anothers(made: Combination) -> None:
    assert_apart(layer_with_three(made), several_rows(made))


@pytest.mark.parametrize("made", [p for p in BATCHED if p.values[0].dtype == torch.float32])
def test_nor_do_they_where_a_compiler_looks(made: Combination, monkeypatch: pytest.MonkeyPatch) -> None:
    """That compiled code computes the same is tested in `test_compile.py`."""
    layer, x = layer_with_three(made), several_rows(made)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_apart(layer, x)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("way", ["groups", "runs"])
@pytest.mark.parametrize("made", [p for p in BATCHED if p.id in FEW])
def test_nor_in_any_way_of_a_product(
    made: Combination, way: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def chosen(*given: Any) -> tuple[mixed_batch.Layout, str]:
        used.append(way)
        return given[0][together], way

    monkeypatch.setattr(mixed_batch, "choose_layout", chosen)
    assert_apart(layer_with_three(made), several_rows(made))
    assert used


class Special(nn.Module):
    """Rows of an embedding, an attention, and a norm that adapters train whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (n, length) -> (n, length, 5)."""
        x = self.embed(ids)
        return self.head(self.norm(self.attn(x, x, x, need_weights=False)[0]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -4.0])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["attn"]},
        {"target_modules": ["head"], "trainable_token_indices": {"embed": [1, 3, 4]}},
        {"target_modules": ["embed"], "trainable_token_indices": {"head": [1, 3, 4]}},
        {"target_modules": ["head"], "modules_to_save": ["norm"]},
        {"target_modules": ["embed", "head"], "use_dora": True},
        {"target_modules": ["embed", "head"], "lora_dropout": 0.2},
    ],
    ids=["attention", "tokens", "tokens of a head", "modules_to_save", "dora", "dropout"],
)
def test_nor_in_layers_that_are_no_product(
    options: dict[str, Any], value: float, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    owners = ["a", "b", BASE, "b", "a"]
    mine, others = [1, 3], [0, 2, 4]
    ids = torch.arange(20).view(5, 4) % 11

    def computed(factors: bool, outward: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(Special(), LoraConfig(r=2, lora_alpha=3, **options), "a").train()
        model.add_adapter("b", LoraConfig(r=3, lora_alpha=4, **options))
        index = model.base_model.index
        own = {name: list(index.parameters(name)) for name in "ab"}
        with torch.no_grad():
            for name in "ab":
                for parameter in own[name]:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
                    if name == "b" and factors:
                        parameter.fill_(value)
        for parameter in (*own["a"], *own["b"]):
            parameter.requires_grad_(True)
        torch.manual_seed(1)
        y = model(ids, adapter_names=owners)
        with torch.no_grad():
            inferred = model.eval()(ids, adapter_names=owners)
        given = torch.linspace(-1, 1, y.numel()).view_as(y)
        if outward:
            given[mine] = value
        gradients = torch.autograd.grad(y, [*own["a"], *own["b"]], given, allow_unused=True)[: len(own["a"])]
        assert all(gradient is not None and gradient.any() for gradient in gradients)
        found = {str(number): gradient for number, gradient in enumerate(gradients)}
        return {"y": y[others], "inferred": inferred[others], **found}

    expected = computed(False, 0.0)
    for factors, outward in ((True, 0.0), (False, value), (True, value)):
        for name, tensor in computed(factors, outward).items():
            assert torch.equal(bits(tensor), bits(expected[name])), (name, factors, outward)
