"""Restoring the dots of module paths that kohya's sd-scripts write with underscores.

The names inside a UNet of diffusers and a text encoder of CLIP are known; for others the base model's names
are needed. Names of the original Stable Diffusion code (``input_blocks``) become those of diffusers, for
UNets of two layers a block, which those of Stable Diffusion 1, 2 and XL are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Parts of paths that contain underscores, and single words.
_PARTS = frozenset(
    """
    down_blocks up_blocks mid_block transformer_blocks time_embedding add_embedding conv_in conv_out
    conv_shortcut time_emb_proj proj_in proj_out to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj
    to_add_out linear_1 linear_2 text_model self_attn q_proj k_proj v_proj out_proj text_projection
    attentions resnets downsamplers upsamplers attn1 attn2 attn ff net proj conv conv1 conv2 encoder layers
    mlp fc1 fc2 token_embedding position_embedding embeddings
    """.split()
)
_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)")
_MIDDLE = re.compile(r"middle_block_([012])_(.+)")
_LAYERS = 2


class FlatNames:
    """Turns flat names into paths.

    Args:
        known: The paths of a base model's modules, which take precedence over the rules.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known: dict[str, str | None] = {}
        for path in known:
            flat = path.replace(".", "_")
            self._known[flat] = None if flat in self._known else path  # ambiguous: use neither

    def path(self, flat: str) -> str | None:
        """The path of a flat name, or None if the dots cannot be determined."""
        found = self._known.get(flat) or self._known.get(f"text_model_{flat}")
        if found is None and flat.startswith("text_model_"):
            found = self._known.get(flat.removeprefix("text_model_"))
        return found or _original(flat) or _dotted(flat)


def _dotted(flat: str) -> str | None:
    words, path, at = flat.split("_"), [], 0
    while at < len(words):
        if words[at].isdigit():
            path.append(words[at])
            at += 1
            continue
        for count in (3, 2, 1):
            part = "_".join(words[at : at + count])
            if part in _PARTS and at + count <= len(words):
                path.append(part)
                at += count
                break
        else:
            return None
    return ".".join(path)


def _original(flat: str) -> str | None:
    """The path in diffusers of a name of the original code."""
    if flat in _OUTSIDE:
        return _OUTSIDE[flat]
    if match := _MIDDLE.fullmatch(flat):
        number, rest = int(match[1]), match[2]
        return _inside(f"mid_block.{'attentions.0' if number == 1 else f'resnets.{number // 2}'}", rest)
    if match := _BLOCK.fullmatch(flat):
        side, number, inner, rest = match[1], int(match[2]), int(match[3]), match[4]
        at = number - 1 if side == "input_blocks" else number
        block, layer = divmod(at, _LAYERS + 1)
        if at < 0 or inner > 2:
            return None
        start = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}"
        if rest in ("op", "conv"):
            return f"{start}.{'downsamplers' if rest == 'op' else 'upsamplers'}.0.conv"
        return _inside(f"{start}.{('resnets', 'attentions', '')[inner]}.{layer}", rest)
    return None


def _inside(start: str, rest: str) -> str | None:
    kind = start.split(".")[-2]
    end = _RESNET.get(rest) if kind == "resnets" else _dotted(rest) if kind == "attentions" else None
    return None if end is None else f"{start}.{end}"
