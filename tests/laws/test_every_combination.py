"""The product of the registries: each combination is refused with a reason, or obeys the laws."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws import compact, product
from tests.laws.product import LINEAR, Choice
from tests.pairwise import pairwise
from tests.storages import torchao_weight
from veneer import PeftModel
from veneer.backends.base import Backend
from veneer.backends.dense import Dense
from veneer.errors import TargetError
from veneer.inits.base import Init
from veneer.inits.random import Arbitrary, Default
from veneer.layers import LoraLayer
from veneer.layers.linear import LoraLinear
from veneer.testing import registered_for_now
from veneer.variants.alora import ALora
from veneer.variants.dora import Dora
from veneer.variants.plain import Plain

PAIRS = product.pairs()
#: Each with the reason for which it is refused, or None.
EXISTING = {c: (*c, product.refusal(c)) for c in product.product() if PAIRS[c.layer, c.storage]}
#: Every pair of choices that is served somewhere, and of those that are refused every pair and reason.
SHORT = pairwise(row for row in EXISTING.values() if row[-1] is None) | pairwise(
    row for row in EXISTING.values() if row[-1] is not None
)
ABSENT = [pair for pair, exists in PAIRS.items() if not exists]


def _id(choice: tuple[str, ...]) -> str:
    return "-".join((choice[0].rpartition(".")[2], *choice[1:]))


@pytest.mark.parametrize(
    "choice",
    [pytest.param(c, id=_id(c), marks=() if EXISTING[c] in SHORT else pytest.mark.slow) for c in EXISTING],
)
def test_it_is_refused_or_obeys_the_laws(choice: Choice, tmp_path: Path) -> None:
    compact.holds(choice, tmp_path)


@pytest.mark.parametrize("pair", ABSENT, ids=_id)
def test_a_storage_that_is_said_not_to_exist_does_not(pair: tuple[str, str]) -> None:
    layer, storage = pair
    if not product.is_served(layer, storage):
        return  # none of the types that the backend knows behaves like the layer's
    assert storage == "torchao", "only torchao's storage is a type of tensor, which might be anywhere"
    case = product.case_of(layer)
    with pytest.raises(
        (ValueError, NotImplementedError, AssertionError), match=r"works for|unimpl|only|have"
    ):
        torchao_weight(case.base().requires_grad_(False))(case.x())


# -- the enumeration and the checker can fail --------------------------------------------------------


def test_a_plug_in_is_in_the_product_the_moment_it_exists() -> None:
    with registered_for_now():

        class Late(Init):
            names = ("late",)
            __call__ = Default.__call__

        class LateVariant(Plain):
            name = "late"

        class LateBackend(Dense):
            name = "late"

        class LateLayer(LoraLayer):
            wraps = ("somewhere.Late",)

        every = list(product.product())
        for what in ({"Late"}, {"late"}, {"somewhere.Late"}):
            assert any(what & set(choice) for choice in every)
        assert Choice("somewhere.Late", "Late", "late", "late") in every
        assert product.pairs()["somewhere.Late", "dense"], (
            "what nobody knows how to build is tried, and fails"
        )
        for choice in (every[0]._replace(layer="somewhere.Late"), every[0]._replace(storage="late")):
            with pytest.raises(
                LookupError, match=r"say how a .* in (LAYERS|BACKENDS) of tests/laws/cases.py"
            ):
                compact.holds(choice, Path())
    assert not any("late" in "".join(choice).lower() for choice in product.product())


def _wrong_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Default, "__call__", Arbitrary.__call__)


def _start_of_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Arbitrary, "__call__", Default.__call__)


def _whole(change: Callable[[Any, Callable[[], torch.Tensor]], torch.Tensor]) -> Callable[..., None]:
    def break_it(patch: pytest.MonkeyPatch) -> None:
        right = LoraLinear.fused_step
        patch.setattr(LoraLinear, "fused_step", lambda self, x: change(self, lambda: right(self, x)))

    return break_it


@torch.no_grad()
def _write(layer: Any) -> None:
    layer.lora_B["default"].weight.add_(0.0)


def _base_learns(patch: pytest.MonkeyPatch) -> None:
    def careless(model: Any, config: Any) -> PeftModel:
        return adapt(model, config).requires_grad_(True)

    adapt = compact.get_peft_model
    patch.setattr(compact, "get_peft_model", careless)


def _never_disabled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PeftModel, "disable_adapter", lambda self: nullcontext())


def _merged_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dora, "merged", lambda self, weight, delta, extra: weight + 2 * delta)


def _almost_put_back(patch: pytest.MonkeyPatch) -> None:
    def inexact(self: Backend, module: Any, kept: Any, name: str = "weight") -> None:
        self.write(module, kept[name] * (1 + 2**-22), name)

    patch.setattr(Dense, "put_back", inexact)


def _loaded_otherwise(patch: pytest.MonkeyPatch) -> None:
    load = PeftModel.from_pretrained

    def careless(*args: Any, **kwargs: Any) -> PeftModel:
        model = load(*args, **kwargs)
        with torch.no_grad():
            model.base_model.model.target.lora_B["default"].weight.mul_(1 + 2**-22)
        return model

    patch.setattr(PeftModel, "from_pretrained", careless)


def _refused_too_late(patch: pytest.MonkeyPatch) -> None:
    def late(model: Any, config: Any) -> Any:
        model.target.training = not model.target.training
        raise TargetError("no")

    patch.setattr(product, "refusal", lambda choice: "no")
    patch.setattr(compact, "get_peft_model", late)


def _refused_for_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(product, "refusal", lambda choice: "no")


def _unrefused_merge(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ALora, "refuses_merge", lambda self, spec: None)


_DENSE = Choice(LINEAR, "Default", "plain", "dense")
_ALORA = _DENSE._replace(variant="alora")
#: What breaks one law, on what, and what the checker says then.
BREAKERS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Choice, str]] = {
    "a start that is not the base": (_wrong_start, _DENSE, "the start is not the base"),
    "a start that is": (_start_of_nothing, _DENSE._replace(init="Arbitrary"), "against its promise"),
    "a base that learns": (_base_learns, _DENSE, "may learn, or may not"),
    "a gradient of zero": (
        _whole(lambda layer, both: both().detach() + 0.0 * both()),
        _DENSE,
        "is zero",
    ),
    "a gradient that is not finite": (
        _whole(lambda layer, both: both() + (both() - both()).abs().sqrt()),
        _DENSE,
        "is not finite",
    ),
    "a forward that writes": (_whole(lambda layer, both: (_write(layer), both())[1]), _DENSE, "a step wrote"),
    "disabling that does nothing": (_never_disabled, _DENSE, "disabled is not the base"),
    "a merge that is wrong": (_merged_twice, _DENSE._replace(variant="dora"), "not close"),
    "an unmerge that is almost right": (_almost_put_back, _DENSE, "is not what it was"),
    "a load that is almost right": (_loaded_otherwise, _DENSE, "is not what it was"),
    "a refusal that changes something": (_refused_too_late, _DENSE, "flags"),
    "a refusal that does not happen": (_refused_for_nothing, _DENSE, "DID NOT RAISE"),
    "a merge that should be refused": (_unrefused_merge, _ALORA, "no weight does that"),
}


@pytest.mark.parametrize("what", BREAKERS)
def test_what_breaks_a_law_is_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, choice, said = BREAKERS[what]
    break_it(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=said):
        compact.holds(choice, tmp_path)
