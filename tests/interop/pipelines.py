"""A tiny Stable Diffusion pipeline with random weights, for fresh processes: imported there by path."""

from __future__ import annotations

from typing import Any

import torch


def unet(linear: bool = False) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=linear,
    ).eval()


def text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=8,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=30,
            max_position_embeddings=8,
        )
    ).eval()


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
