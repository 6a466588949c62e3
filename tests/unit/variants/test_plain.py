"""The registry of variants, and plain LoRA."""

from __future__ import annotations

import pytest
import torch

from veneer.errors import ConfigError
from veneer.spec import LoraSpec
from veneer.variants import Variant, get, registry


def test_plain_adds() -> None:
    plain = get("plain")
    assert plain.additive
    weight, delta = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(plain.merged(weight, delta, {}), weight + delta)
    assert plain.refuses(LoraSpec("a", "default", 2, 6.0), "Linear") is None


def test_plain_hands_the_branch_to_the_layer() -> None:
    class Layer:
        def add_branch(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
            assert name == "default"
            return result + 2 * x

    out = get("plain").forward(Layer(), "default", torch.ones(2), torch.zeros(2), torch.zeros(2).clone)
    assert torch.equal(out, torch.full((2,), 2.0))


def test_an_unknown_variant_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'nonsense'.*plain"):
        get("nonsense")


def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="registered twice"):

        class Again(Variant):
            name = "plain"

            def forward(self, *args: object) -> torch.Tensor:
                raise NotImplementedError

            def merged(self, *args: object) -> torch.Tensor:
                raise NotImplementedError

    assert type(registry.get("plain")).__name__ == "Plain"
