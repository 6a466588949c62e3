"""The laws of one adapted layer, for every layer case, initialisation, variant, backend and dtype."""

from __future__ import annotations

import traceback

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules

from tests.laws.cases import ALL, EACH_CASE, Combination, acting_everywhere, train
from veneer.layers import wrap
from veneer.testing import laws
from veneer.testing.laws import close

#: Laws that do not depend on the numbers are tried on one combination of each layer case.
_ONCE = {parameter.id for parameter in EACH_CASE}


def applies(law: laws.Law, made: Combination, name: str) -> bool:
    """Whether a law is tried on a combination."""
    if law.once:
        return name in _ONCE
    return not (law.mergeable and made.unmergeable)


def broken_laws(made: Combination, name: str) -> list[str]:
    """The laws that a combination breaks, each with its traceback."""
    broken = []
    for law in laws.LAWS:
        if applies(law, made, name):
            torch.manual_seed(0)
            try:
                law.holds(made)
            except Exception:
                broken.append(f"{law.name} does not hold:\n{traceback.format_exc()}")
    return broken


@pytest.mark.parametrize(
    ("made", "name"), [pytest.param(p.values[0], p.id, id=p.id, marks=p.marks) for p in ALL]
)
def test_the_laws_hold(made: Combination, name: str) -> None:
    with acting_everywhere():  # a layer by itself has no text to be invoked in
        broken = broken_laws(made, name)
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


def test_every_broken_law_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (plain,) = (p for p in EACH_CASE if p.id.startswith("Linear-plain-"))
    made: Combination = plain.values[0]
    assert not broken_laws(made, plain.id)
    monkeypatch.setattr(
        "veneer.layers.layer.LoraLayer.add_branch", lambda self, name, x, result: result + 1.0
    )
    monkeypatch.setattr("veneer.layers.linear.LoraLinear.fused_step", laws.LoraLayer.fused_step)
    monkeypatch.setattr("veneer.layers.linear.LoraLinear.add_branch", laws.LoraLayer.add_branch)
    said = "\n".join(broken_laws(made, plain.id))
    for law in ("a_fresh_adapter_is_an_identity", "only_factors_get_gradients", "merged_equals_unmerged"):
        assert law in said


@pytest.mark.parametrize("made", [p for p in ALL if p.values[0].backend == "offloaded"])
def test_offloaded_weights_stay_where_they_are(made: Combination) -> None:
    layer, x = made.layer(), made.x()
    dense = wrap(made.dense().eval(), made.config())
    train(dense, "default")
    assert all(p.is_meta for p in layer.base_layer.parameters())
    with acting_everywhere():
        actual, expected = layer(x), dense(x)
    assert torch.equal(actual, expected) or made.case.renormalises or close(actual, expected, made) is None
    assert all(p.is_meta for p in layer.base_layer.parameters())
    remove_hook_from_submodules(layer)
