"""The tensor names of diffusers, old and new, and of kohya's sd-scripts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .flat_names import FlatNames

#: The first part of a name -> the part of the pipeline.
_COMPONENTS = ("unet", "transformer", "text_encoder_2", "text_encoder")
_KOHYA = {
    "lora_unet": "unet",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te": "text_encoder",
}
_FLAT = re.compile(
    r"(lora_unet|lora_te1|lora_te2|lora_te)_([^.]+)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
_ROLES = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_A.default.weight": "A",
    "lora_B.default.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
}
_DOTTED = re.compile(rf"(.+)\.({'|'.join(map(re.escape, sorted(_ROLES, key=len, reverse=True)))})")
_ATTENTION = re.compile(r"(.+)\.to_([qkv]|out)_lora\.(down\.weight|up\.weight|alpha)")
_INSIDE = {
    "unet": re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\."),
    "transformer": re.compile(r"(single_)?transformer_blocks\."),
    "text_encoder": re.compile(r"text_model\.encoder\."),
}


@dataclass(frozen=True)
class Place:
    """Where a tensor of a foreign file belongs.

    Attributes:
        spelling: The library that uses this name.
        component: The part of the pipeline.
        path: The module's path in it.
        role: ``A``, ``B``, ``alpha``, ``bias``, ``magnitude`` or ``dora_scale``.
    """

    spelling: str
    component: str
    path: str
    role: str


def place(name: str, flat: dict[str, FlatNames]) -> Place | None:
    """Where a tensor belongs by its name, or None if the name is unknown.

    Args:
        name: As in the file.
        flat: What turns flat names into paths, by part of the pipeline; others take the rules alone.
    """
    if match := _FLAT.fullmatch(name):
        component = _KOHYA[match[1]]
        path = flat.get(component, FlatNames()).path(match[2])
        return None if path is None else Place("kohya", component, path, _ROLES[match[3]])
    component, rest = _component(name)
    if not component:
        return None
    rest = rest.replace(".processor.", ".")
    if match := _ATTENTION.fullmatch(rest):
        role = {"down.weight": "A", "up.weight": "B", "alpha": "alpha"}[match[3]]
        if component.startswith("text_encoder"):
            return Place("old diffusers", component, f"{match[1]}.{match[2]}_proj", role)
        end = "to_out.0" if match[2] == "out" else f"to_{match[2]}"
        return Place("old diffusers", component, f"{match[1]}.{end}", role)
    if match := _DOTTED.fullmatch(rest):
        new = match[2].startswith(("lora_A", "lora_B", "lora_magnitude"))
        return Place("diffusers" if new else "old diffusers", component, match[1], _ROLES[match[2]])
    return None


def _component(name: str) -> tuple[str, str]:
    for component in _COMPONENTS:
        if name.startswith(f"{component}."):
            return component, name.removeprefix(f"{component}.")
    for component, pattern in _INSIDE.items():
        if pattern.match(name):
            return component, name
    return "", name
