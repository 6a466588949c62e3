"""Types that are known and not adapted."""

from __future__ import annotations

import pytest
from torch import nn

from veneer import LoraConfig, TargetError
from veneer.layers import REFUSED, find, refusal, wrap


def test_every_refused_type_exists_and_has_no_layer() -> None:
    for name, reason in REFUSED.items():
        module, _, cls = name.rpartition(".")
        kind = getattr(__import__(module, fromlist=[cls]), cls)
        made = kind.__new__(kind)
        assert f"{kind.__module__}.{kind.__qualname__}" == name
        assert find(made) is None and refusal(made) == reason
    with pytest.raises(TargetError, match="reduces over bags"):
        wrap(nn.EmbeddingBag(3, 3), LoraConfig())
    with pytest.raises(TargetError, match="no layer for this type"):
        wrap(nn.LayerNorm(3), LoraConfig())
