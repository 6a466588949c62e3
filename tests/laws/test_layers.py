"""The laws of one adapted layer, for every layer case, initialisation, variant, backend and dtype."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules

from tests.laws.cases import ALL, EACH_CASE, MERGEABLE, Combination, acting_everywhere, train
from veneer.layers import wrap
from veneer.testing import laws
from veneer.testing.laws import close

__all__ = ["close"]


def _test_of(law: laws.Law) -> object:
    parameters = EACH_CASE if law.once else MERGEABLE if law.mergeable else ALL

    @pytest.mark.parametrize("made", parameters)
    def test(made: Combination) -> None:
        with acting_everywhere():  # a layer by itself has no text to be invoked in
            law.holds(made)

    return test


for _law in laws.LAWS:
    globals()[f"test_{_law.name}"] = _test_of(_law)


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
