"""A DreamBooth run as diffusers' training scripts do it: a few pictures, a rare word, the class kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.interop import tiny_diffusion as tiny

CLASS_PROMPT = "a photo of bag"
STEPS = 6


def pictures() -> Tensor:
    """Four views of one thing (4, 3, 16, 16): a bright square with a dark handle, on grey."""
    views = torch.zeros(4, 3, 16, 16)
    for view, (row, column) in enumerate([(5, 3), (6, 5), (4, 4), (7, 6)]):
        views[view, :, row : row + 7, column : column + 7] = torch.tensor([0.9, 0.4, -0.8])[:, None, None]
        views[view, :, row - 3, column + 1 : column + 6] = -0.9
        views[view, :, row - 3 : row, [column + 1, column + 5]] = -0.9
    return views


def dreambooth(place: Path) -> tuple[list[float], Tensor]:
    """Train UNet and text encoder, save into ``place / "dreambooth"``; the losses and what is drawn then."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny.pipeline()
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    targets = {"unet": ["to_k", "to_q", "to_v", "to_out.0", "conv1"], "text_encoder": ["q_proj", "k_proj"]}
    trained: list[Tensor] = []
    for part, model in parts.items():
        model.requires_grad_(False)
        model.add_adapter(
            LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets[part])
        )
        tiny.shake(model, "default", len(part))  # each library draws in its own order
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        trained += [p for p in model.parameters() if p.requires_grad]
        model.train()
    generator = torch.Generator().manual_seed(12)
    ids = pipe.tokenizer([tiny.PROMPT] * 4 + [CLASS_PROMPT] * 4, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        instances = pipe.vae.encode(pictures()).latent_dist.mean
        # What the class looks like before training; DreamBooth's second loss keeps it.
        of_class = torch.randn(instances.shape, generator=generator)
    latents = torch.cat([instances, of_class]) * pipe.vae.config.scaling_factor
    schedule = DDPMScheduler()
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    noise = torch.randn(latents.shape, generator=generator)  # always the same, so that few steps show
    times = torch.randint(0, 1000, (len(latents),), generator=generator)
    for _ in range(STEPS):
        words = pipe.text_encoder(ids.input_ids)[0]
        guess = pipe.unet(schedule.add_noise(latents, noise, times), times, words).sample
        own, kept = ((guess - noise) ** 2).mean((1, 2, 3)).view(2, 4).mean(1)
        loss = own + kept
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for model in parts.values():
        model.eval()
    pipe.save_lora_weights(
        place / "dreambooth",
        **{f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in parts.items()},
        **_collate_lora_metadata(parts),
    )
    return losses, tiny.image(pipe)


def read(place: Path) -> Tensor:
    """What a fresh pipeline draws with the file."""
    pipe: Any = tiny.pipeline()
    pipe.load_lora_weights(place / "dreambooth", adapter_name="sks")
    return tiny.image(pipe)
