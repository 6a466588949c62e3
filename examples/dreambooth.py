"""DreamBooth: a tiny diffusion pipeline learns one bag from four pictures, by diffusers' own calls.

Nothing is pretrained: the weights start out random, and the pipeline first learns clothes from Fashion-MNIST,
in seconds (``make examples-data``). This shows how it is done, not how good it can be. It compares the base,
LoRA on the UNet, LoRA on UNet and text encoder, and full fine-tuning, with Veneer in place of peft.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from veneer.as_peft import register_as_peft

register_as_peft()  # before diffusers, which asks on import whether peft is there

# Both report on import what else might be installed.
os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")

import side_by_side  # noqa: E402

# isort: split
import data  # noqa: E402
import torch  # noqa: E402
from diffusers import (  # noqa: E402
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    ModelMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.training_utils import _collate_lora_metadata  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from veneer import LoraConfig, get_peft_model_state_dict  # noqa: E402

CLASSES = {"shirt": 0, "trousers": 1, "sneaker": 7, "bag": 8}
WORDS = ("a", "photo", "of", "sks", *CLASSES)
INSTANCE, CLASS = "a photo of sks bag", "a photo of bag"
SIZE, LENGTH = 16, 8
LORA, BOTH, FULL = "LoRA, UNet", "LoRA, UNet and text encoder", "full fine-tuning"
RATES = {LORA: 1e-2, BOTH: 1e-2, FULL: 5e-4}
UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj"]
NOISE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")


class Pixels(ModelMixin, ConfigMixin):
    """Instead of a VAE: the latents are the pixels, so the pictures show what the UNet does."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0, block_out_channels: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.register_buffer("where", torch.zeros(1))

    def decode(self, latents: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (latents,)


def tokenizer() -> Any:
    """CLIP's tokenizer, with the few words of the prompts as single tokens."""
    merges = []
    for word in WORDS:
        letters = [*word[:-1], word[-1] + "</w>"]
        merges += [("".join(letters[:place]), letters[place]) for place in range(1, len(letters))]
    merges = list(dict.fromkeys(merges))
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *map("".join, merges)]))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def random_models(words: int) -> nn.ModuleDict:
    """UNet and text encoder as Stable Diffusion has them, a thousand times smaller."""
    unet = UNet2DConditionModel(
        sample_size=SIZE, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    )  # fmt: skip
    return nn.ModuleDict({"unet": unet, "text_encoder": encoder})


class Darkroom:
    """The models' words, noise and pictures."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()

    def ids(self, prompts: list[str]) -> Tensor:
        return self.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids

    def loss(
        self, models: Any, pictures: Tensor, ids: Tensor, draws: torch.Generator | None = None
    ) -> Tensor:
        """How far the UNet's guess of the noise is off, for each picture. pictures: (n, 1, s, s) -> (n,)"""
        noise = torch.randn(pictures.shape, generator=draws)
        times = torch.randint(0, NOISE.config.num_train_timesteps, (len(pictures),), generator=draws)
        words = models["text_encoder"](ids)[0]
        guess = models["unet"](NOISE.add_noise(pictures, noise, times), times, words).sample
        return (guess - noise).square().mean((1, 2, 3))

    @torch.no_grad()
    def held_out(self, models: Any, pictures: Tensor, prompt: str) -> float:
        """The loss on fixed noise that no training has drawn."""
        models.eval()
        many = pictures.repeat(128 // len(pictures), 1, 1, 1)
        draws = torch.Generator().manual_seed(10_000)
        return self.loss(models, many, self.ids([prompt] * len(many)), draws).mean().item()

    def pipeline(self, models: Any) -> Any:
        pipe = StableDiffusionPipeline(
            vae=Pixels(), unet=models["unet"], text_encoder=models["text_encoder"], tokenizer=self.tokenizer,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        # Pixels, unlike latents, are known to lie between -1 and 1.
        pipe.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, steps_offset=1)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, prompt: str, count: int, steps: int) -> Tensor:
        """Pictures (count, s, s) from 0 to 1, always from the same noise."""
        noise = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        drawn = pipe([prompt] * count, latents=noise, num_inference_steps=steps, guidance_scale=5.0,
                     output_type="pt")  # fmt: skip
        return drawn.images[:, 0]


def clothes(count: int) -> tuple[Tensor, Tensor]:
    """Pictures (n, 1, s, s) from -1 to 1 and their labels, of the classes that have a word."""
    pictures, labels = data.fashion_mnist()
    chosen = torch.isin(labels, torch.tensor(list(CLASSES.values()))).nonzero().flatten()[:count]
    small = nn.functional.interpolate(pictures[chosen, None].float() / 127.5 - 1, (SIZE, SIZE), mode="area")
    return small, labels[chosen]


def views(bag: Tensor, shifts: list[tuple[int, int]]) -> Tensor:
    """One bag with a cross on it, seen from several sides. bag: (1, s, s) -> (n, 1, s, s)"""
    marked, middle = bag.clone(), SIZE // 2 + 1
    for step in range(-3, 4):
        marked[0, middle + step, SIZE // 2 + step] = 1.0
        marked[0, middle + step, SIZE // 2 - step] = -1.0
    turned = [marked if (row + column) % 2 else marked.flip(-1) for row, column in shifts]
    return torch.stack([torch.roll(v, shift, (-2, -1)) for v, shift in zip(turned, shifts, strict=True)])


def learn_clothes(room: Darkroom, models: Any, pictures: Tensor, labels: Tensor, steps: int) -> None:
    """The pretraining that a real pipeline brings along."""
    names = {number: f"a photo of {word}" for word, number in CLASSES.items()}
    optimizer = torch.optim.AdamW(models.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    models.train()
    for _ in range(steps):
        rows = torch.randint(len(pictures), (16,))
        prompts = [names[label] for label in labels[rows].tolist()]
        prompts[:2] = ["", ""]  # so that guidance has something to lead away from
        loss = room.loss(models, pictures[rows], room.ids(prompts)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> int:
    study = side_by_side.Study(__doc__)
    torch.set_num_threads(1)  # tensors so small that a second thread mostly waits
    room = Darkroom()
    pictures, labels = clothes(8192)
    bags = pictures[labels == CLASSES["bag"]]
    instances = views(bags[0], [(0, 0), (0, 1), (-1, 0), (1, -1)])
    unseen = views(bags[0], [(1, 0), (0, -1), (-1, 1), (1, 1)])
    others = bags[-32:]
    steps = 15 if study.short else 80
    look = 4 if study.short else 20

    side_by_side.seed_all(0)
    base = random_models(len(room.tokenizer))
    learn_clothes(room, base, pictures[:-128], labels[:-128], 60 if study.short else 400)
    base.eval()
    # What the class looks like to the base: DreamBooth's second half keeps it.
    kept = 2 * room.draw(room.pipeline(base), CLASS, 16, look)[:, None] - 1
    built: list[str] = []
    drawn: dict[str, Tensor] = {}
    returned: dict[str, bool] = {}

    def build(method: str) -> Any:
        if method not in built:
            built.append(method)
        models = copy.deepcopy(base).requires_grad_(False)
        if method in (LORA, BOTH):
            models["unet"].add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=UNET))
        if method == BOTH:
            models["text_encoder"].add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ENCODER))
        if method == FULL:
            models["unet"].requires_grad_(True)
        return models

    def train(models: Any, method: str, seed: int) -> None:
        optimizer = torch.optim.AdamW([p for p in models.parameters() if p.requires_grad], lr=RATES[method])
        ids = room.ids([INSTANCE] * 4 + [CLASS] * 4)
        models.train()
        for _ in range(steps):
            batch = torch.cat([instances, kept[torch.randint(len(kept), (4,))]])
            loss = room.loss(models, batch, ids).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def score(models: Any) -> dict[str, float]:
        found = {
            "loss, this bag": room.held_out(models, unseen, INSTANCE),
            "loss, other bags": room.held_out(models, others, CLASS),
        }
        if len(drawn) < len(built):  # of each method, what its first seed gives
            pipe = room.pipeline(models)
            drawn[built[-1]] = torch.cat([room.draw(pipe, prompt, 4, look) for prompt in (INSTANCE, CLASS)])
        return found

    def save(models: Any, folder: Path) -> None:
        pipe = room.pipeline(models)
        adapted = {part: model for part, model in models.items() if hasattr(model, "peft_config")}
        if not adapted:
            models["unet"].save_pretrained(folder)
            return
        pipe.save_lora_weights(
            folder,
            **{f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in adapted.items()},
            **_collate_lora_metadata(adapted),
        )
        again = room.pipeline(copy.deepcopy(base))
        again.load_lora_weights(folder)
        one, other = (room.draw(p, INSTANCE, 4, look) for p in (pipe, again))
        returned[f"{len(adapted)} parts"] = torch.equal(one, other)
        again.fuse_lora(components=list(adapted))
        again.unfuse_lora(components=list(adapted))
        again.unload_lora_weights()
        returned[f"{len(adapted)} parts, the base"] = all(
            torch.equal(value, dict(base.state_dict())[f"{part}.{name}"])
            for part in adapted
            for name, value in getattr(again, part).state_dict().items()
        )

    methods = ["base", LORA, BOTH, FULL]
    study.compare(methods, build, train, score, once=("base",), save=save)
    for name in (LORA, BOTH):
        study.claim(f"{name}: knows the bag better than the base, with every seed",
                    study.highest(name) < study.lowest("base"))  # fmt: skip
    study.claim("a file read into a fresh pipeline draws the same pictures, bit for bit",
                all(same for key, same in returned.items() if "base" not in key))  # fmt: skip
    study.claim("fused, unfused and unloaded, the base has every bit back",
                all(same for key, same in returned.items() if "base" in key))  # fmt: skip
    study.claim("the adapter's file is under a fifth of the UNet's",
                study.rows[LORA].saved_bytes * 5 < study.rows[FULL].saved_bytes)  # fmt: skip
    show(study, instances, kept, drawn)
    return study.finish()


def show(study: side_by_side.Study, instances: Tensor, kept: Tensor, drawn: dict[str, Tensor]) -> None:
    """The training pictures, and what each method draws: left with the rare word, right without it."""
    rows = {"given": torch.cat([instances[:, 0], kept[:4, 0]]) / 2 + 0.5, **drawn}
    figure, axes = study.figure(8.0, 0.95 * len(rows), nrows=len(rows), ncols=8)
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, row, strict=True):
            axis.imshow(picture.clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(
            name.replace(", ", "\n").replace(" and ", "\nand "), rotation=0, ha="right", va="center"
        )
    for place, prompt in ((0, INSTANCE), (4, CLASS)):
        axes[0][place].set_title(f"“{prompt}”", loc="left", size=9)
    study.save_figure(figure)


if __name__ == "__main__":
    side_by_side.run(main)
