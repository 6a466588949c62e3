"""PEFT's format as several programs read it: factors, one rank, one scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config.residual import RESIDUAL_MARK
from ...errors import ExportError
from ...expert_layouts.telling import MARK as LAYOUT_MARK
from ...files.keys import PREFIX
from ...files.layout import CONFIG_NAME, SAFETENSORS_NAME
from ...files.read import open_adapter
from ...files.write import write_adapter
from .base import Part, Target, plain_config
from .source import Update

FILES = (CONFIG_NAME, SAFETENSORS_NAME)


def factors(updates: Mapping[str, Update], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Updates as tensors by PEFT's names."""
    tensors = {}
    for path, update in updates.items():
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if update.embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{prefix}{path}.{names[0]}"] = update.a
        tensors[f"{prefix}{path}.{names[1]}"] = update.b
        if update.bias is not None:
            tensors[f"{prefix}{path}.lora_B.bias"] = update.bias
        if update.magnitude is not None:
            tensors[f"{prefix}{path}.lora_magnitude_vector"] = update.magnitude
    return tensors


def metadata(part: Part) -> dict[str, str]:
    """What the source's file says of its base.

    A frozen term is a plain part of the factors here, and experts may lie in another layout.
    """
    return {k: v for k, v in part.source.metadata.items() if k not in ("format", RESIDUAL_MARK, LAYOUT_MARK)}


class PeftFiles(Target):
    """A target whose files are `adapter_config.json` and `adapter_model.safetensors`."""

    files: ClassVar[tuple[str, ...]] = FILES

    def write(self, parts: list[Part], place: Path) -> None:
        """The two files."""
        (part,) = parts
        write_adapter(
            place,
            {**factors(self.laid_out(part.folded.updates)), **self.others(part)},
            self.config(part),
            metadata=metadata(part),
        )

    def laid_out(self, updates: Mapping[str, Update]) -> Mapping[str, Update]:
        """Updates as the file has them, where it has several in one."""
        return updates

    def apart(self, updates: dict[str, Update], r: int) -> dict[str, Update]:
        """The inverse of `laid_out`; r is the rank of all."""
        return updates

    def config(self, part: Part) -> dict[str, Any]:
        return plain_config(part)

    def others(self, part: Part) -> dict[str, Tensor]:
        """The tensors that are no factors: whatever the target keeps."""
        return {name: t for tensors in part.source.others.values() for name, t in tensors.items()}

    def read(self, place: Path) -> dict[str, dict[str, Update]]:
        """What a reader makes of the files: one scale from the configuration, the rest from the names."""
        values = json.loads((place / CONFIG_NAME).read_text(encoding="utf-8"))
        if values.get("rank_pattern") or values.get("alpha_pattern"):
            raise ExportError(f"{place} has patterns of ranks or strengths")
        tensors = open_adapter(place).tensors()
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            path, mark, role = name.rpartition(".lora_")
            if mark:
                found.setdefault(path.removeprefix(PREFIX), {})[role] = tensor
        updates = {path: self._update(parts, values) for path, parts in found.items()}
        return {"": self.apart(updates, int(values["r"]))}

    def changed_others(self, part: Part, place: Path) -> list[str]:
        """Those of `others`."""
        meant, tensors = self.others(part), open_adapter(place).tensors()
        read = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
        wrong = [n for n in meant.keys() | read.keys() if n not in meant or n not in read]
        wrong += [n for n in meant.keys() & read.keys() if not torch.equal(meant[n], read[n])]
        return sorted(wrong)

    def _update(self, parts: Mapping[str, Tensor], values: Mapping[str, Any]) -> Update:
        embedding = "embedding_A" in parts
        a = parts["embedding_A" if embedding else "A.weight"]
        b = parts["embedding_B" if embedding else "B.weight"]
        r = self.rank_of(a, values)
        scaling = values["lora_alpha"] / (r**0.5 if values.get("use_rslora") else r)
        return Update(a, b, scaling, embedding, parts.get("B.bias"), parts.get("magnitude_vector"))

    def rank_of(self, a: Tensor, values: Mapping[str, Any]) -> int:
        return int(values["r"])
