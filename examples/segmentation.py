"""Semantic segmentation: a small SegFormer that knows shirts and shoes learns to outline other clothes.

``python examples/segmentation.py`` composes its pictures: clothes from Fashion-MNIST, cut out and placed on
textures, so that every pixel's class is known. No pretrained SegFormer is available without a hub, so it
first trains a small one in full, from random weights, on one set of clothes; that is the base. Then it adapts
the base to other clothes on other textures: the decoding head alone, LoRA in the encoder with the head, and
all weights. It exits with 1 unless LoRA's mean IoU is at least twice that of always guessing the most
frequent class, and above that of the head alone.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from data import CLOTHES, fashion_mnist
from side_by_side import Study, run
from torch import nn
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from veneer import LoraConfig, get_peft_model

SIDE, BATCH = 48, 16
#: Classes are 0 for the ground, then these, from 1 on.
SOURCE = ("T-shirt", "pullover", "dress", "sandal", "sneaker")
TARGET = ("trousers", "bag", "ankle boot")
LEARNING_RATE = {"head only": 3e-3, "LoRA": 3e-3, "full": 1e-3}


def textures(count: int, kind: str, draw: torch.Generator) -> torch.Tensor:
    """Grounds (count, 1, SIDE, SIDE) from 0 to 1: soft noise, or stripes and checks."""
    if kind == "source":
        coarse = torch.rand(count, 1, 7, 7, generator=draw)
        return F.interpolate(coarse, size=SIDE, mode="bicubic").clamp(0, 1)
    angle, phase, wave = (torch.rand(count, 1, 1, 1, generator=draw) for _ in range(3))
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = x * torch.cos(3.14 * angle) + y * torch.sin(3.14 * angle)
    across = y * torch.cos(3.14 * angle) - x * torch.sin(3.14 * angle)
    speed = 0.4 + wave
    stripes = torch.sin(speed * along + 6.28 * phase)
    checks = stripes * torch.sin(speed * across)
    return 0.5 + 0.3 * torch.where(phase > 0.5, stripes, checks)


def scenes(count: int, kind: str, seed: int, train: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, SIDE, SIDE) and masks (count, SIDE, SIDE): two garments each, anywhere."""
    draw = torch.Generator().manual_seed(seed)
    names = SOURCE if kind == "source" else TARGET
    garments, labels = fashion_mnist(train)
    ground = textures(count, kind, draw) * torch.rand(count, 3, 1, 1, generator=draw)
    mask = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    wanted = torch.tensor([CLOTHES.index(name) for name in names])
    usable = torch.isin(labels, wanted).nonzero()[:, 0]
    for picture in range(count):
        for _ in range(2):
            chosen = usable[torch.randint(len(usable), (1,), generator=draw)]
            garment = garments[chosen][:, None].float() / 255
            size = int(torch.randint(24, 37, (1,), generator=draw))
            garment = F.interpolate(garment, size=size, mode="bilinear")[0]
            top, left = torch.randint(SIDE - size + 1, (2,), generator=draw).tolist()
            colour = 0.3 + 0.7 * torch.rand(3, 1, 1, generator=draw)
            there = garment[0] > 0.1
            kind_of = names.index(CLOTHES[labels[chosen]]) + 1
            part = ground[picture, :, top : top + size, left : left + size]
            part[:] = torch.where(there, garment * colour, part)
            part = mask[picture, top : top + size, left : left + size]
            part[:] = torch.where(there, kind_of, part)
    return (ground - 0.4) / 0.3, mask


def new_segformer(classes: int) -> SegformerForSemanticSegmentation:
    config = SegformerConfig(
        num_labels=classes,
        depths=[1, 1, 2, 1],
        hidden_sizes=[24, 48, 96, 128],
        num_attention_heads=[1, 2, 4, 4],
        strides=[2, 2, 2, 2],
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    return SegformerForSemanticSegmentation(config)


def fit(model: nn.Module, pictures: torch.Tensor, masks: torch.Tensor, steps: int, rate: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(pictures), (BATCH,))
        loss = model(pixel_values=pictures[rows], labels=masks[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def predict(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    model.eval()
    logits = torch.cat([model(pixel_values=part).logits for part in pictures.split(50)])
    return F.interpolate(logits, size=SIDE, mode="bilinear").argmax(1)


def mean_iou(predicted: torch.Tensor, masks: torch.Tensor) -> float:
    """Mean over the classes of (pixels both call so) / (pixels either calls so)."""
    classes = range(len(TARGET) + 1)
    both = [((predicted == c) & (masks == c)).sum() for c in classes]
    either = [((predicted == c) | (masks == c)).sum() for c in classes]
    return float(sum(b / e for b, e in zip(both, either, strict=True)) / len(classes))


def main() -> int:
    study = Study(__doc__, validation=True)
    sizes = (240, 60, 100, 30, 40) if study.short else (3000, 600, 600, 150, 300)
    source_count, source_steps, count, steps, held_out = sizes
    pictures, masks = scenes(count, "target", seed=1)
    test_pictures, test_masks = scenes(held_out, "target", seed=3 if study.part == "test" else 2, train=False)

    @cache
    def base() -> SegformerForSemanticSegmentation:
        """The base: trained in full on the source clothes, once."""
        torch.manual_seed(0)
        study.progress.say("the base: random weights, trained whole on other clothes")
        model = new_segformer(len(SOURCE) + 1)
        fit(model, *scenes(source_count, "source", seed=0), source_steps, 2e-3)
        return model

    def build(method: str) -> nn.Module:
        model = copy.deepcopy(base())
        old = model.decode_head.classifier
        model.decode_head.classifier = nn.Conv2d(old.in_channels, len(TARGET) + 1, kernel_size=1)
        if method == "LoRA":
            config = LoraConfig(
                r=8,
                lora_alpha=16,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
                modules_to_save=["decode_head"],
            )
            return get_peft_model(model, config)
        model.requires_grad_(method == "full")
        model.decode_head.requires_grad_(method != "base")
        return model

    shown: dict[str, torch.Tensor] = {}

    def score(model: nn.Module) -> dict[str, float]:
        predicted = predict(model, test_pictures)
        shown["latest"] = predicted
        return {
            "mean IoU": mean_iou(predicted, test_masks),
            "right pixels in %": 100 * float((predicted == test_masks).float().mean()),
        }

    methods = ["head only", "LoRA", *([] if study.short else ["full"])]
    for method in methods:
        study.compare(
            [method],
            build,
            lambda model, method, seed: fit(model, pictures, masks, steps, LEARNING_RATE[method]),
            score,
        )
        shown[method] = shown.pop("latest")

    majority = mean_iou(torch.zeros_like(test_masks), test_masks)
    study.show(f"always the most frequent class, the ground: mean IoU {majority:.3f}")
    if study.short:
        study.claim("LoRA beats the most frequent class", study.lowest("LoRA") > majority)
    else:
        twice = study.lowest("LoRA") >= 2 * majority
        study.claim("LoRA has at least twice the mean IoU of the most frequent class", twice)
        study.claim("LoRA beats the head alone", study.lowest("LoRA") > study.highest("head only"))
    study.extra["majority"] = majority
    draw(study, test_pictures, {"true": test_masks, **shown})
    return study.finish()


def draw(study: Study, pictures: torch.Tensor, masks: dict[str, torch.Tensor]) -> None:
    """A row for every method: the masks of the last seed for the first six pictures."""
    count = 6
    figure, axes = study.figure(8, 1.35 * (len(masks) + 1), nrows=len(masks) + 1, ncols=count)
    for column in range(count):
        axes[0, column].imshow((pictures[column].permute(1, 2, 0) * 0.3 + 0.4).clamp(0, 1))
        for row, mask in enumerate(masks.values(), 1):
            axes[row, column].imshow(mask[column], cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
    for row, name in enumerate(["picture", *masks]):
        axes[row, 0].set_ylabel(name)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    study.save_figure(figure)


if __name__ == "__main__":
    run(main)
