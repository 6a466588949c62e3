"""All combinations of registered layers, initialisations, variants and storages, and why some are refused.

The page `docs/api.md` is written from this, and `test_every_combination.py` checks each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.laws import cases
from tests.laws.cases import Combination
from tests.storages import backends, torchao_parameter, torchao_weight
from veneer.backends.base import geometry
from veneer.errors import ConfigError
from veneer.inits.base import inits
from veneer.layers import LoraLayer, find, registry
from veneer.layers.making import why_not
from veneer.layers.parameter import LoraParameter
from veneer.spec import resolve
from veneer.testing.made import LayerCase
from veneer.variants import registry as variants

LINEAR = "torch.nn.modules.linear.Linear"


class Stack(nn.Module):
    """A bare parameter: a matrix, or a stack of them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, in) -> (n, out), or (count, n, in) -> (count, n, out)."""
        return torch.matmul(x, self.stack.transpose(-2, -1))


#: Layers that are no type of module.
PARAMETERS: dict[str, LayerCase] = {
    "a matrix": LayerCase("matrix", partial(Stack, 8, 6), partial(torch.randn, 5, 6)),
    "a stack of matrices": LayerCase("stack", partial(Stack, 3, 8, 6), partial(torch.randn, 3, 4, 6)),
}
#: Types that are tried in a model of their own, as they take several inputs.
ATTENTION: dict[str, LayerCase] = {
    "torch.nn.modules.activation.MultiheadAttention": LayerCase(
        "attention", partial(nn.MultiheadAttention, 8, 2), partial(torch.randn, 5, 3, 8)
    )
}
#: How other layers than linears come into a storage as codes, where its library computes with them there.
CODED: dict[tuple[str, str], Callable[[nn.Module], nn.Module]] = {
    ("torch.nn.modules.sparse.Embedding", "torchao"): torchao_weight,
    ("torch.nn.modules.conv.Conv2d", "torchao"): torchao_weight,
    ("a matrix", "torchao"): torchao_parameter,
}
#: Storages as codes that any layer may be in: its tensors tell.
ANYWHERE = ("fp8", "scaled")


class Choice(NamedTuple):
    """One of each: a layer's type or what it is, the class of an initialisation, a variant, a backend."""

    layer: str
    init: str
    variant: str
    storage: str


def layers() -> list[str]:
    """Every registered type, and the layers that have none."""
    return [*(name for name, _ in registry.items()), *PARAMETERS]


def storages() -> list[str]:
    """Every registered backend."""
    return [backend.name for backend in backends()]


def product() -> Iterator[Choice]:
    """All combinations of what is registered now, those of one layer in one storage together."""
    starts = [type(init).__name__ for init in inits()]
    for layer, storage in itertools.product(layers(), storages()):
        for init, variant in itertools.product(starts, variants.names()):
            yield Choice(layer, init, variant, storage)


def case_of(layer: str) -> LayerCase:
    """The layer that is tried.

    Raises:
        LookupError: If the laws do not know how it is built.
    """
    if layer in cases.LAYERS:
        return cases.LAYERS[layer][0]
    known = {**PARAMETERS, **ATTENTION}
    if layer not in known:
        raise LookupError(f"say how a {layer} is built in LAYERS of tests/laws/cases.py")
    return known[layer]


def store_of(layer: str, storage: str) -> Callable[[nn.Module], nn.Module] | None:
    """What brings the layer into that storage; None where there is no such layer.

    Raises:
        LookupError: If the laws do not know how.
    """
    if storage not in cases.BACKENDS:
        raise LookupError(f"say how a layer is stored in {storage} in BACKENDS of tests/laws/cases.py")
    if storage in cases.CODED and layer != LINEAR and storage not in ANYWHERE:
        return CODED.get((layer, storage))
    return cases.BACKENDS[storage]


def pairs() -> dict[tuple[str, str], bool]:
    """Each layer with each storage, and whether there is such a thing; one that is not known counts."""
    result = {}
    for layer, storage in itertools.product(layers(), storages()):
        try:
            result[layer, storage] = store_of(layer, storage) is not None
        except LookupError:
            result[layer, storage] = True
    return result


def made(choice: Choice) -> Combination:
    """What is tried."""
    case, store = case_of(choice.layer), store_of(choice.layer, choice.storage)
    result = Combination(case, *choice[1:], torch.float32)
    assert store is not None, f"there is no {choice.layer} in {choice.storage}"
    object.__setattr__(result, "store", store)
    return result


def title(layer: str) -> str:
    """What the page calls it."""
    return layer if layer in PARAMETERS else f"`{layer.rpartition('.')[2]}`"


@cache
def _layer(layer: str, storage: str) -> LoraLayer:
    """A layer without adapters."""
    store = store_of(layer, storage)
    assert store is not None
    base = store(case_of(layer).base())
    if layer in PARAMETERS:
        return LoraParameter(base, "stack")
    cls = find(base)
    assert cls is not None
    return cls(base)


def refusal(choice: Choice) -> str | None:
    """Why a combination is refused, or None."""
    try:
        spec = resolve(made(choice).config(), "default", "")
        reason = why_not(_layer(choice.layer, choice.storage), spec)
        return None if reason is None else str(reason)
    except ConfigError as error:
        return str(error)


def refuses_merge(layer: str, variant: str, storage: str) -> str | None:
    """Why the storage, or the variant, says that merging would be wrong; None where it is right."""
    adapted = _layer(layer, storage)
    declared = adapted.backend.refuses_to_write(adapted.get_base_layer(), adapted.weight_name)
    kind = variants.get(variant)
    assert kind is not None
    spec = resolve(
        Combination(case_of(LINEAR), "Default", variant, storage, torch.float32).config(), "default", ""
    )
    return declared or kind.refuses_merge(spec)


def names_in_reasons(layer: str, storage: str) -> list[str]:
    """What a reason may call a layer and its storage."""
    adapted = _layer(layer, storage)
    base, kind = type(adapted.base_layer).__name__, str(adapted.backend.quantization)
    return [f"a {base}", base, kind, kind.upper()]


def is_served(layer: str, storage: str) -> bool:
    """Whether the registries say that a backend stores weights of such layers."""
    backend = next(b for b in backends() if b.name == storage)
    kind = type(case_of(layer).base())
    return backend.serves(kind) or geometry(kind) in backend.geometry.values()
