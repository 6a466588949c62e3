"""mlx-lm: a format of its own, factors turned round and one scale for all."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...wording import listed
from .base import Part, Problem, Target
from .folding import Rules
from .source import Source, Update

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"


class Mlx(Target):
    """mlx-lm's ``--adapter-path``: ``lora_a`` (in, r), ``lora_b`` (r, out), ``m`` (out,) for DoRA."""

    name = "mlx"
    reader = "mlx-lm's --adapter-path"
    rules = Rules("any")
    keeps = frozenset({"head", "dora"})
    files = (CONFIG, TENSORS)
    sometimes = MappingProxyType(
        {"embedding": "where the base does not tie it", "tied": "where the base ties them"}
    )

    def more_problems(self, source: Source) -> list[Problem]:
        """An embedding's update, which mlx-lm applies to a tied head too."""
        features = source.features()
        names = features.get("embedding")
        if not names:
            return []
        if "dora" in features:
            return [Problem(f"an embedding ({listed(names)}) in a DoRA")]
        tied = source.base_config().get("tie_word_embeddings")
        if tied is not None and bool(tied) == ("tied" in features):
            return []
        reason = "the base is not at hand to look" if tied is None else f"tie_word_embeddings is {tied}"
        return [
            Problem(
                f"an update of {listed(names)}: mlx-lm applies it to the output as well where the base ties "
                f"its embeddings, this adapter {'does, too' if 'tied' in features else 'does not'}, and "
                f"{reason}"
            )
        ]

    def write(self, parts: list[Part], place: Path) -> None:
        """The two files; modules are named by full paths, so that no other becomes a LoRA."""
        (part,) = parts
        tensors: dict[str, Tensor] = {}
        for path, update in part.folded.updates.items():
            tensors[f"{path}.lora_a"] = update.a.t().contiguous()
            tensors[f"{path}.lora_b"] = update.b.t().contiguous()
            if update.magnitude is not None:
                tensors[f"{path}.m"] = update.magnitude.reshape(-1).contiguous()
        save_file(tensors, place / TENSORS, metadata={"format": "pt"})
        text = json.dumps(self._config(part), indent=2, sort_keys=True)
        (place / CONFIG).write_text(text + "\n", encoding="utf-8")

    def _config(self, part: Part) -> dict[str, Any]:
        folded, config = part.folded, part.source.config
        dora = any(update.magnitude is not None for update in folded.updates.values())
        found = {
            "fine_tune_type": "dora" if dora else "lora",
            "num_layers": -1,  # all of them
            "lora_parameters": {
                "rank": folded.r,
                "scale": folded.alpha / folded.r,
                "dropout": config.lora_dropout,
                "keys": sorted(folded.updates),
            },
        }
        return found | ({"model": config.base_model_name_or_path} if config.base_model_name_or_path else {})

    def read(self, place: Path) -> dict[str, dict[str, Update]]:
        """As ``linear_to_lora_layers`` and ``load_weights`` do."""
        values = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        scale = float(values["lora_parameters"]["scale"])
        tensors = load_file(place / TENSORS)
        found = {}
        for path in values["lora_parameters"]["keys"]:
            a, b = tensors.pop(f"{path}.lora_a").t(), tensors.pop(f"{path}.lora_b").t()
            found[path] = Update(a, b, scale, None, magnitude=tensors.pop(f"{path}.m", None))
        found.update({name: Update(t, t, scale) for name, t in tensors.items()})  # what no key explains
        return {"": found}

    def usage(self, place: object, parts: list[Part]) -> str:
        base = shlex.quote(parts[0].source.base_name())
        return f"mlx_lm.generate --model {base} --adapter-path {shlex.quote(str(place))}"
