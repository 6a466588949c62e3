"""The tiny Stable Diffusion without what draws pictures, and what its parts compute; for adapter files."""

from __future__ import annotations

from typing import Any

import torch

from tests.interop import tiny_diffusion
from tests.interop.tiny_diffusion import text_encoder

__all__ = ["drawn", "encoded", "pipeline", "text_encoder", "unet"]


def unet() -> Any:
    """With two layers a block, as Stable Diffusion has."""
    return tiny_diffusion.unet(layers=2)


def pipeline() -> Any:
    """Without a tokenizer and an autoencoder: nothing here draws a picture."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder(),
        tokenizer=None,
        unet=unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def drawn(model: Any) -> torch.Tensor:
    torch.manual_seed(2)
    noise, words = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8)
    return model(noise, torch.tensor([3]), words).sample


@torch.no_grad()
def encoded(model: Any) -> torch.Tensor:
    return model(torch.arange(6).view(1, 6)).last_hidden_state
