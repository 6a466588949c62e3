"""mlx-lm: a format of its own, factors turned round and one scale for all."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...files.rope import older_names
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
    keeps = frozenset({"dora"})
    files = (CONFIG, TENSORS)
    sometimes = MappingProxyType(
        {
            "embedding": "where the base does not tie it",
            "head": "where the base does not tie it",
            "tied": "where the base ties them",
        }
    )

    def prepared(self, source: Source) -> tuple[Source, dict[str, Tensor], list[Problem]]:
        """The adapter without the pair of a head that follows the embedding: mlx-lm's does so by itself."""
        following = _following(source) if "tied" in source.features() else []
        updates = {path: update for path, update in source.updates.items() if path not in following}
        return replace(source, updates=updates), {}, []

    def more_problems(self, source: Source) -> list[Problem]:
        """A tied head, which mlx-lm has not got, and an embedding's update, which it applies to both."""
        features = source.features()
        names, heads, tied = features.get("embedding"), features.get("head"), source.base_ties()
        found = []
        if heads and (tied or "tied" in features):
            found.append(
                Problem(
                    f"an update of {listed(heads)} alone: mlx-lm has no such layer where the base ties "
                    "embedding and head"
                )
            )
        return found + (self._of_embedding(names, features, tied) if names else [])

    def _of_embedding(
        self, names: list[str], features: Mapping[str, list[str]], tied: bool | None
    ) -> list[Problem]:
        if "dora" in features:
            return [Problem(f"an embedding ({listed(names)}) in a DoRA")]
        if tied is not None and tied == ("tied" in features):
            return []
        reason = "the base is not there to check" if tied is None else f"tie_word_embeddings is {tied}"
        return [
            Problem(
                f"an update of {listed(names)}: mlx-lm applies it to the output as well where the base ties "
                f"its embeddings, this adapter {'does, too' if 'tied' in features else 'does not'}, and "
                f"{reason}"
            )
        ]

    def notes(self, source: Source) -> list[str]:
        """A head of a base that is not here, or one that follows the embedding; a base that it misreads."""
        features = source.features()
        found = []
        if missing := older_names(source.base_config()):
            found.append(
                f"mlx-lm looks for {' and '.join(missing)} at the top of {source.base_name()}'s config.json, "
                f"and computes another model where that is missing: add {json.dumps(missing)}"
            )
        if "tied" in features:
            found.append("the embedding's pair is written alone: mlx-lm applies it to the head too")
        if "head" in features and source.base_ties() is None:
            found.append(
                "mlx-lm takes an update of the head only where the base does not tie it to the embedding, "
                "and the base is not there to check"
            )
        return found

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


def _following(source: Source) -> list[str]:
    """The heads whose update is the embedding's, turned round."""
    leads = [update for update in source.updates.values() if update.embedding]
    return [path for path in source.features().get("head", ()) if _is_turned(source.updates[path], leads)]


def _is_turned(head: Update, leads: list[Update]) -> bool:
    return any(
        head.scaling == lead.scaling and torch.equal(head.a, lead.b.t()) and torch.equal(head.b, lead.a.t())
        for lead in leads
    )
