"""A tiny Stable Diffusion with random weights, for fresh processes: imported there by path."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

PROMPT = "a photo of sks bag"
WORDS = ("a", "photo", "of", "sks", "bag", "shirt")


def unet(layers: int = 1) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=layers,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_factor=8.0,  # so that the words matter
    )
    return CLIPTextModel(config).eval()


def _merges() -> list[tuple[str, str]]:
    """What joins the letters of each word, from the left."""
    steps = []
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for place in range(1, len(letters)):
            steps.append(("".join(letters[:place]), letters[place]))
    return list(dict.fromkeys(steps))


def _vocabulary() -> dict[str, int]:
    letters = sorted({letter for word in WORDS for letter in word})
    ends = [f"{letter}</w>" for letter in letters]
    joined = ["".join(pair) for pair in _merges()]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *ends, *joined]
    return {token: place for place, token in enumerate(dict.fromkeys(tokens))}


def tokenizer() -> Any:
    """CLIP's own, that knows a few words and spells all others in letters."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(_vocabulary()))
        merges = ["#version: 0.2", *(" ".join(pair) for pair in _merges())]
        (Path(folder) / "merges.txt").write_text("\n".join(merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def pipeline() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    made = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def image(pipe: Any, prompt: str = PROMPT, **kwargs: Any) -> torch.Tensor:
    """What the pipeline draws from fixed noise, as latents: decoding clips."""
    with torch.no_grad():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        drawn = pipe(prompt, latents=noise, num_inference_steps=2, output_type="latent", **kwargs)
    return drawn.images


def shake(model: Any, adapter: str, seed: int) -> None:
    """Give the adapter's tensors values that show, the same whoever made them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and adapter in name.split("."):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def flux() -> Any:
    """A transformer in the manner of Flux: two kinds of blocks, image and text in one sequence."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(4)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def flux_output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 8, generator=generator),
            pooled_projections=torch.randn(1, 8, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0)),
            txt_ids=torch.zeros(3, 3),
        ).sample
