"""What users of diffusers do with adapters, written down: run by each library, then compared.

`live` runs every chapter in a fresh process. A chapter notes what it was told (as JSON) and what was drawn
(tensors). Whichever library goes by the name of peft does the work.
"""

from __future__ import annotations

import importlib
import json
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.interop import diffusion_training
from tests.interop import tiny_diffusion as tiny

#: Two adapters: other ranks, other strengths, other modules, a text encoder in both.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "one": {
        "unet": {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v", "to_out.0"]},
        "text_encoder": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "fc1"]},
    },
    "two": {
        "unet": {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["to_q", "conv1", "proj_in", "time_emb_proj"],
            "rank_pattern": {"mid_block.*to_q": 3},
            "alpha_pattern": {"time_emb_proj": 5},
            "use_rslora": True,
        },
        "text_encoder": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "out_proj"]},
    },
}


class Notes:
    """What one library answered."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.told: dict[str, dict[str, Any]] = {}
        self.drawn: dict[str, Tensor] = {}
        self.chapter = ""

    def tell(self, key: str, value: Any) -> None:
        self.told[self.chapter][key] = value

    def draw(self, key: str, value: Tensor) -> Tensor:
        self.drawn[f"{self.chapter}/{key}"] = value.clone()
        return value

    def save(self) -> None:
        (self.place / "told.json").write_text(json.dumps(self.told, indent=1))
        save_file(self.drawn, self.place / "drawn.safetensors")


def base_weights(*models: nn.Module) -> dict[str, Tensor]:
    return {
        f"{type(model).__name__}.{name}".replace(".base_layer", ""): value.detach().clone()
        for model in models
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


def with_both(notes: Notes) -> Any:
    pipe = tiny.pipeline()
    for name in CONFIGS:
        pipe.load_lora_weights(notes.place / name, adapter_name=name)
    return pipe


def writing(notes: Notes) -> None:
    """Adapters are added, filled, saved by the pipeline's own call, and read again."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    for seed, (name, configs) in enumerate(CONFIGS.items()):
        pipe = tiny.pipeline()
        parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        for part, model in parts.items():
            model.requires_grad_(False)
            model.add_adapter(LoraConfig(**configs[part]))
            trained = sorted(n for n, p in model.named_parameters() if p.requires_grad)
            notes.tell(f"{name} {part} trained", trained)
            tiny.shake(model, "default", 10 * seed + len(part))
        notes.tell(f"{name} listed", [pipe.get_list_adapters(), pipe.get_active_adapters()])
        drawn = notes.draw(name, tiny.image(pipe))
        if name == "one":
            layers = {
                f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
                for part, model in parts.items()
            }
            pipe.save_lora_weights(notes.place / name, **layers)
        else:  # as the training scripts do it: with the configurations in the file's header
            states = {part: get_peft_model_state_dict(model) for part, model in parts.items()}
            layers = {f"{part}_lora_layers": state for part, state in states.items()}
            pipe.save_lora_weights(notes.place / name, **layers, **_collate_lora_metadata(parts))
        again = tiny.pipeline()
        again.load_lora_weights(notes.place / name, adapter_name="again")
        if name == "one":  # without a header diffusers takes the rank for alpha: half the strength is lost
            again.set_adapters("again", {"unet": 2.0})
        assert torch.equal(tiny.image(again), drawn)


def switching(notes: Notes) -> None:
    """Which adapters count, and how much: for all, for a component, for a block."""
    pipe = tiny.pipeline()
    base = notes.draw("base", tiny.image(pipe))
    for name in CONFIGS:
        pipe.load_lora_weights(notes.place / name, adapter_name=name)
        notes.tell(f"after loading {name}", [pipe.get_list_adapters(), pipe.get_active_adapters()])
        notes.draw(f"after loading {name}", tiny.image(pipe))
    weights: dict[str, Any] = {
        "both": (["one", "two"], None),
        "half": ("one", 0.5),
        "none": (["one", "two"], 0.0),
        "two numbers": (["two", "one"], [0.3, -1.5]),
        "component": (["one", "two"], [{"unet": 0.7, "text_encoder": 0.2}, 1.0]),
        "block": ("one", {"unet": {"down": 0.4, "mid": 2.0, "up": {"block_0": [0.1, 0.9]}}}),
        "one": ("one", 1.0),
    }
    for key, (names, values) in weights.items():
        pipe.set_adapters(names, values)
        notes.tell(key, [pipe.get_active_adapters(), pipe.unet.active_adapters()])
        notes.draw(key, tiny.image(pipe))
    assert torch.equal(notes.drawn["switching/none"], base)
    pipe.unet.set_adapters(["one", "two"], [0.25, {"mid": 0.0}])
    notes.draw("by the unet", tiny.image(pipe))
    pipe.set_adapters(["one", "two"])
    notes.draw("scaled in the call", tiny.image(pipe, cross_attention_kwargs={"scale": 0.5}))
    # Only "both" in the text encoder; the call's scale does not stay.
    assert torch.equal(tiny.image(pipe), notes.drawn["switching/both"])
    pipe.disable_lora()
    assert torch.equal(tiny.image(pipe), base)
    notes.tell("disabled", pipe.get_active_adapters())
    pipe.enable_lora()
    assert torch.equal(tiny.image(pipe), notes.drawn["switching/both"])
    pipe.set_adapters("one")
    pipe.delete_adapters("two")
    notes.tell("deleted", pipe.get_list_adapters())
    assert torch.equal(tiny.image(pipe), notes.drawn["switching/one"])
    pipe.unload_lora_weights()
    notes.tell("unloaded", [pipe.get_list_adapters(), pipe.get_active_adapters()])
    assert torch.equal(tiny.image(pipe), base)
    assert sorted(tiny.pipeline().unet.state_dict()) == sorted(pipe.unet.state_dict())
    pipe.load_lora_weights(notes.place / "two", adapter_name="one")  # the name is free again
    notes.draw("another under the name", tiny.image(pipe))


def fusing(notes: Notes, exact: bool) -> None:
    """Adapters go into the weights and come out again."""
    pipe = with_both(notes)
    parts = ["unet", "text_encoder"]
    before = base_weights(pipe.unet, pipe.text_encoder)
    calls: dict[str, Any] = {
        "active": (["one", "two"], {}),
        "weighed": (["one", "two"], {"weights": [0.5, 0.25]}),
        "named": (["one", "two"], {"adapter_names": ["one"]}),
        "one after the other": (["one", "two"], {"adapter_names": ["one"], "then": ["two"]}),
        "not active": ("one", {"adapter_names": ["two"]}),
        "safe": ("two", {"safe_fusing": True}),
        "scaled": (["one", "two"], {"lora_scale": 0.5}),
    }
    for key, (names, options) in calls.items():
        weights, then = options.pop("weights", None), options.pop("then", None)
        pipe.set_adapters(names, weights)
        unfused = notes.draw(f"{key}, not fused", tiny.image(pipe))
        pipe.fuse_lora(components=parts, **options)
        if then:
            pipe.fuse_lora(components=parts, adapter_names=then)
        notes.tell(key, [sorted(pipe.fused_loras), pipe.num_fused_loras])
        notes.draw(key, tiny.image(pipe))
        pipe.unfuse_lora(components=parts)
        notes.tell(f"{key}, unfused", sorted(pipe.fused_loras))
        after = base_weights(pipe.unet, pipe.text_encoder)
        if exact:
            assert all(torch.equal(value, after[name]) for name, value in before.items()), key
            if "lora_scale" not in options:
                assert torch.equal(tiny.image(pipe), unfused), key
    # diffusers does not take `lora_scale` back when it unfuses: the strength stays halved.
    notes.draw("after a scale", tiny.image(pipe))
    pipe.fuse_lora(components=["unet"])
    pipe.unfuse_lora(components=["text_encoder"])
    notes.tell("by component", sorted(pipe.fused_loras))
    pipe.unload_lora_weights()
    notes.draw("fused and unloaded", tiny.image(pipe))


def swapping(notes: Notes) -> None:
    """Another adapter takes the place of one, in the same parameters."""
    one = load_file(notes.place / "one" / "pytorch_lora_weights.safetensors")
    one = {key: value for key, value in one.items() if key.startswith("unet.")}
    other = {key: value.flip(0) * 0.5 for key, value in one.items()}
    generator = torch.Generator().manual_seed(9)
    wide = {}
    for key, value in one.items():
        shape = list(value.shape)
        shape[".up." in key] = 6
        wide[key] = torch.randn(shape, generator=generator) * 0.2

    def loaded(pipe: Any, file: dict[str, Tensor], **options: Any) -> Tensor:
        copied = {key: value.clone() for key, value in file.items()}  # some would keep the tensors themselves
        pipe.load_lora_weights(copied, adapter_name="place", **options)
        return tiny.image(pipe)

    def addresses(pipe: Any) -> list[int]:
        return [p.data_ptr() for n, p in pipe.unet.named_parameters() if "lora_" in n]

    pipe = tiny.pipeline()
    first = loaded(pipe, one)
    held = addresses(pipe)
    swapped = notes.draw("same rank", loaded(pipe, other, hotswap=True))
    assert addresses(pipe) == held
    assert torch.equal(swapped, loaded(tiny.pipeline(), other))

    # Of another rank: there must be room first.
    pipe = tiny.pipeline()
    pipe.enable_lora_hotswap(target_rank=8)
    assert torch.equal(notes.draw("with room", loaded(pipe, one)), first)
    held = addresses(pipe)
    notes.draw("wider", loaded(pipe, wide, hotswap=True))
    notes.draw("wider, loaded", loaded(tiny.pipeline(), wide))
    assert torch.equal(loaded(pipe, one, hotswap=True), first)
    pipe.set_adapters("place", 0.5)
    notes.draw("weighed", tiny.image(pipe))
    assert addresses(pipe) == held
    try:
        pipe.load_lora_weights(dict(wide), adapter_name="place")
    except ValueError as error:
        notes.tell("taken", str(error))


def kohya_file() -> dict[str, Tensor]:
    """An adapter as sd-scripts writes it; alpha is not the rank, ranks differ, a convolution is among it."""
    made, generator = {}, torch.Generator().manual_seed(11)
    unet, encoder = tiny.unet(), tiny.text_encoder()
    wanted = [
        ("lora_unet", unet, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 4, 2.0),
        ("lora_unet", unet, "mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 3, 2.0),
        ("lora_unet", unet, "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", 4, 2.0),
        ("lora_unet", unet, "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", 4, 2.0),
        ("lora_unet", unet, "up_blocks.0.attentions.0.proj_in", 4, 2.0),
        ("lora_te_text_model", encoder, "encoder.layers.0.self_attn.q_proj", 4, 2.0),
        ("lora_te_text_model", encoder, "encoder.layers.0.self_attn.out_proj", 4, 2.0),
        ("lora_te_text_model", encoder, "encoder.layers.1.mlp.fc1", 4, 2.0),
    ]
    for prefix, model, path, rank, alpha in wanted:
        weight = model.get_submodule(path).weight
        key = f"{prefix}_{path.replace('.', '_')}"
        down = (rank, *weight.shape[1:])
        up = (weight.shape[0], rank, *(1,) * (weight.dim() - 2))
        made[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.3
        made[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.3
        made[f"{key}.alpha"] = torch.tensor(alpha)
    return made


def kohya_by_hand() -> Any:
    """The pipeline with the file's updates added to its weights: ``W + alpha / r · up · down``."""
    pipe, file = tiny.pipeline(), kohya_file()
    for prefix, model in (("lora_unet", pipe.unet), ("lora_te_text_model", pipe.text_encoder)):
        for path, module in model.named_modules():
            key = f"{prefix}_{path.replace('.', '_')}"
            if f"{key}.alpha" in file:
                down, up = (file[f"{key}.lora_{end}.weight"] for end in ("down", "up"))
                strength = file[f"{key}.alpha"] / len(down)
                update = (up.flatten(1) @ down.flatten(1)).view_as(module.weight) * strength
                module.weight.data += update
                file = {name: value for name, value in file.items() if not name.startswith(f"{key}.")}
    assert not file, sorted(file)
    return pipe


def kohya(notes: Notes) -> None:
    """A file of sd-scripts through diffusers' own conversion."""
    save_file(kohya_file(), notes.place / "kohya.safetensors")
    pipe = tiny.pipeline()
    pipe.load_lora_weights(notes.place, weight_name="kohya.safetensors", adapter_name="kohya")
    notes.tell("listed", pipe.get_list_adapters())
    notes.draw("loaded", tiny.image(pipe))
    notes.draw("by hand", tiny.image(kohya_by_hand()))


def transformer(notes: Notes, exact: bool) -> None:
    """A transformer instead of a UNet: the model's own calls, and its own file."""
    from peft import LoraConfig

    model = tiny.flux()
    base = notes.draw("base", tiny.flux_output(model))
    wanted = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "norm1.linear", "x_embedder"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=wanted), adapter_name="one")
    tiny.shake(model, "one", 1)
    drawn = notes.draw("one", tiny.flux_output(model))
    model.save_lora_adapter(notes.place / "flux", adapter_name="one")
    again = tiny.flux()
    again.load_lora_adapter(notes.place / "flux", prefix=None, adapter_name="x", use_safetensors=True)
    assert torch.equal(tiny.flux_output(again), drawn)
    notes.tell("adapters", [again.active_adapters(), list(again.peft_config)])
    again.set_adapters("x", 0.5)
    notes.draw("half", tiny.flux_output(again))
    again.set_adapters("x")
    again.fuse_lora()
    notes.draw("fused", tiny.flux_output(again))
    again.unfuse_lora()
    if exact:
        assert torch.equal(tiny.flux_output(again), drawn)
    again.delete_adapters("x")
    if exact:
        assert torch.equal(tiny.flux_output(again), base)


def magnitudes(notes: Notes, exact: bool) -> None:
    """DoRA, over linear layers and convolutions."""
    from peft import LoraConfig

    def output(model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(6)
        x, words = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
        with torch.no_grad():
            return model(x, torch.tensor([3]), words).sample

    model = tiny.unet()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "conv1"], use_dora=True)
    model.add_adapter(config, adapter_name="one")
    tiny.shake(model, "one", 1)
    drawn = notes.draw("one", output(model))
    model.save_lora_adapter(notes.place / "dora", adapter_name="one")
    again = tiny.unet()
    again.load_lora_adapter(notes.place / "dora", prefix=None, adapter_name="x", use_safetensors=True)
    assert torch.equal(output(again), drawn)
    again.fuse_lora()
    notes.draw("fused", output(again))
    again.unfuse_lora()
    if exact:
        assert torch.equal(output(again), drawn)


def training(notes: Notes) -> None:
    """A tiny DreamBooth run; the losses are compared too."""
    losses, drawn = diffusion_training.dreambooth(notes.place)
    notes.draw("losses", torch.tensor(losses))
    notes.draw("drawn", drawn)


CHAPTERS: dict[str, Callable[..., None]] = {
    c.__name__: c for c in (writing, switching, fusing, swapping, kohya, transformer, magnitudes, training)
}


def live(place: Path, exact: bool, chapters: Iterable[str] = tuple(CHAPTERS)) -> None:
    """Run chapters; one that fails is noted with its traceback.

    Args:
        place: Where files and notes go.
        exact: Hold the library to undoing bit for bit, and to having no reason to warn.
        chapters: Their names.
    """
    if exact:
        warnings.filterwarnings("error", category=importlib.import_module("veneer").VeneerWarning)
    notes = Notes(place)
    for name in chapters:
        chapter = CHAPTERS[name]
        notes.chapter = name
        notes.told[name] = {}
        wants = "exact" in chapter.__annotations__
        try:
            chapter(notes, exact) if wants else chapter(notes)
        except Exception:  # told, so that one test shows it and the others go on
            notes.told[name]["error"] = traceback.format_exc()
    notes.save()


def read_files(place: Path) -> dict[str, Tensor]:
    """What comes of the files that some other process left in `place`."""
    drawn = {}
    for name in CONFIGS:
        pipe = tiny.pipeline()
        pipe.load_lora_weights(place / name, adapter_name=name)
        drawn[name] = tiny.image(pipe)
    model = tiny.flux()
    model.load_lora_adapter(place / "flux", prefix=None, adapter_name="x", use_safetensors=True)
    drawn["flux"] = tiny.flux_output(model)
    if (place / "dreambooth").is_dir():
        drawn["dreambooth"] = diffusion_training.read(place)
    return drawn
