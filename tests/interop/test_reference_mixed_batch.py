"""Mixed batches beside the reference: the same rows, for every kind of layer that both can mix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from tests.interop.reference import both, expect_same_model, output, peft, quiet, randomise
from tests.interop.test_reference_files import KINDS, config
from tests.tolerances import assert_close


@pytest.mark.parametrize(
    "kind", ["linear", "conv1d_of_transformers", "embedding", "conv1d", "conv2d", "conv3d"]
)
def test_rows_of_a_mixed_batch_are_the_references(kind: str) -> None:
    case = KINDS[kind]
    ours, theirs = both(lambda: case.build().eval(), config(kind, "plain"))
    given = config(kind, "plain") | {"r": 2, "lora_alpha": 5}
    ours.add_adapter("second", veneer.LoraConfig(**given))
    with quiet():
        theirs.add_adapter("second", peft.LoraConfig(**given))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    expect_same_model(ours, theirs)
    x = case.inputs()
    names = [("default", "__base__", "second")[row % 3] for row in range(x.shape[0])]
    with torch.no_grad():
        mine, its = ours(x, adapter_names=names), theirs(x, adapter_names=names)
    assert_close(mine, its)
    assert not torch.allclose(mine, output(ours, x))


@pytest.mark.parametrize("kind", ["linear", "embedding", "gemma3"])
def test_a_layer_called_by_itself(kind: str) -> None:
    if kind == "gemma3":
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

        def build() -> nn.Module:
            return nn.ModuleDict({"embed": Gemma3TextScaledWordEmbedding(12, 6, 0, embed_scale=6**0.5)})

        options, path, x = {"r": 2, "target_modules": ["embed"]}, "embed", torch.arange(6).view(3, 2)
    else:
        build, options, x = KINDS[kind].build, config(kind, "plain"), KINDS[kind].inputs()
        path = next(n for n, m in both(build, options)[0].get_base_model().named_modules() if hasattr(m, "r"))
    ours, theirs = both(build, options)
    ours.add_adapter("second", veneer.LoraConfig(**options))
    with quiet():
        theirs.add_adapter("second", peft.LoraConfig(**options))
    randomise(theirs)
    theirs.set_adapter("second")
    randomise(theirs, seed=2)
    ours.load_state_dict(theirs.state_dict())
    names = [("default", "__base__", "second")[row % 3] for row in range(x.shape[0])]
    mine, its = (m.get_base_model().get_submodule(path)(x, adapter_names=names) for m in (ours, theirs))
    assert_close(mine, its)
