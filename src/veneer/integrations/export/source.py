"""What an adapter in PEFT's format holds, sorted by what other readers may or may not take."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config import LoraConfig
from ...config.expressions import Paths
from ...errors import AdapterFileError
from ...files.keys import PREFIX
from ...lora_file import factor_names, open_lora
from ...module_names import parents, saved_modules
from ...ops.merging import is_finite
from ...spec import variant_name
from ...wording import bullets
from .base_model import BaseModel, config_in

#: Initialisations under whose name a file's factors count from a base that the initialisation changed.
CHANGED_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga")

#: Everything that an adapter may have beside factors of matrices, and how a refusal calls it.
FEATURES = {
    "use_rslora": "use_rslora (alpha / √r)",
    "rank_pattern": "a rank of their own (rank_pattern)",
    "alpha_pattern": "a strength of their own (alpha_pattern)",
    "lora_bias": "a bias of B (lora_bias)",
    "dora": "the magnitudes of DoRA",
    "embedding": "an update of an embedding",
    "head": "an update of the output head",
    "conv": "an update of a convolution",
    "tied": "one update for embedding and head (ensure_weight_tying)",
    "attention": "an update inside nn.MultiheadAttention",
    "experts": "updates of bare parameters (target_parameters)",
    "modules_to_save": "modules trained whole (modules_to_save)",
    "bias": "biases of the base model",
    "tokens": "single trained tokens (trainable_token_indices)",
    "layer_replication": "repeated layers (layer_replication)",
}


@dataclass(frozen=True)
class Update:
    """One module's update ``s·B A``, as it lies on disk.

    Attributes:
        a: A (r, in), of a convolution (r, in, k…), of an embedding (r, vocabulary).
        b: B (out, r), of a convolution (out, r, 1…), of an embedding (dim, r).
        scaling: s.
        embedding: Whether it is that of a lookup; None where the format does not say.
        bias: Bias of B (out,), counted with s too.
        magnitude: Of DoRA, (out,) or shaped to multiply an output.
    """

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool | None = False
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        return int(self.a.shape[0])

    def is_finite(self) -> bool:
        tensors = (self.a, self.b, self.bias, self.magnitude)
        return all(tensor is None or is_finite(tensor) for tensor in tensors)


@dataclass(frozen=True)
class Source:
    """An adapter that was read.

    Attributes:
        directory: Where it lies.
        config: Its configuration.
        updates: Module path -> update.
        metadata: Those of its file.
        copies: Embedding's path -> the copy of its base weight that was saved along.
        others: The tensors that are no part of an update, by feature and by their names on disk.
        base: Its base model, where that was given.
    """

    directory: Path
    config: LoraConfig
    updates: dict[str, Update]
    metadata: dict[str, str]
    copies: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: BaseModel | None = None

    def features(self) -> dict[str, list[str]]:
        """The features that it has, with the modules or tensors that have them."""
        config, updates = self.config, self.updates
        layer = {path: update for path, update in updates.items() if not update.embedding}
        found = {
            "use_rslora": list(updates) if config.use_rslora else [],
            "rank_pattern": _unlike({path: u.r for path, u in updates.items()}),
            "alpha_pattern": _unlike({p: round(u.scaling * self._divisor(u), 9) for p, u in updates.items()}),
            "lora_bias": [path for path, u in updates.items() if u.bias is not None],
            "dora": [path for path, u in updates.items() if u.magnitude is not None],
            "embedding": [path for path, u in updates.items() if u.embedding],
            "head": [path for path in layer if path.rpartition(".")[2] == "lm_head"],
            "conv": [path for path, u in layer.items() if u.a.dim() > 2],
            "tied": [p for p, u in updates.items() if u.embedding] if config.ensure_weight_tying else [],
            "attention": [path for path in updates if ".base_layer." in path],
            "experts": list(config.target_parameters or ()),
            "layer_replication": [str(config.layer_replication)] if config.layer_replication else [],
        }
        for name, tensors in self.others.items():
            found[name] = list(tensors)
        return {name: found[name] for name in FEATURES if found.get(name)}

    def _divisor(self, update: Update) -> float:
        return float(update.r**0.5 if self.config.use_rslora else update.r)

    def named_base(self) -> str | None:
        """The base that was given, or what the configuration calls it."""
        given = "" if self.base is None else self.base.place
        return given or self.config.base_model_name_or_path or None

    def base_name(self) -> str:
        """The base, for a command."""
        return self.named_base() or "BASE"

    def base_config(self) -> dict[str, Any]:
        """The configuration of the base that was given, or that lies where it is named; else empty."""
        if self.base is not None:
            return self.base.config
        named = self.config.base_model_name_or_path
        return config_in(named) if named else {}

    def base_ties(self) -> bool | None:
        """Whether the base's head shares the weight of its embedding; None where that is not known."""
        config = self.base_config()
        ties = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
        return None if ties is None else bool(ties)


def read_source(directory: str | os.PathLike[str]) -> Source:
    """Read an adapter, every tensor accounted for.

    Raises:
        AdapterFileError: It is missing, broken or no LoRA, its configuration and tensors disagree, or it
            holds tensors that nothing in its configuration explains; lists all of them.
    """
    config, file, specs, _ = open_lora(directory)
    names, others_than_factors = factor_names(file)
    rest = dict.fromkeys(others_than_factors)
    tensors = file.tensors()
    updates = {}
    for path, roles in names.items():
        bias = _pop(rest, tensors, f"{PREFIX}{path}.lora_B.bias")
        updates[path] = Update(
            tensors[roles["A"]],
            tensors[roles["B"]],
            specs[path].scaling,
            "lora_embedding" in roles["A"],
            bias,
            _pop(rest, tensors, f"{PREFIX}{path}.lora_magnitude_vector")
            if f"{PREFIX}{path}.lora_magnitude_vector" in rest
            else _pop(rest, tensors, f"{PREFIX}{path}.lora_magnitude_vector.weight"),
        )
    copies: dict[str, Tensor] = {}
    others: dict[str, dict[str, Tensor]] = {}
    unknown = []
    around = {name: parents(name.removeprefix(PREFIX)) for name in rest}
    modules = Paths(list({path for paths in around.values() for path in paths}))
    saved = {path for path, hits in saved_modules(config.modules_to_save or ()).over(modules).items() if hits}
    for name in rest:
        kind = _kind(name, config, not saved.isdisjoint(around[name]))
        if kind == "copy":
            path = name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
            copies[path] = tensors[name]
        elif kind is None:
            unknown.append(name)
        else:
            others.setdefault(kind, {})[name] = tensors[name]
    _check(file.path, config, updates, unknown)
    return Source(Path(directory), config, updates, dict(file.metadata), copies, others)


def _pop(rest: dict[str, None], tensors: dict[str, Tensor], name: str) -> Tensor | None:
    if name not in rest:
        return None
    del rest[name]
    return tensors[name]


def _kind(name: str, config: LoraConfig, saved: bool) -> str | None:
    path = name.removeprefix(PREFIX)
    if path == name or ".lora_" in path:
        return None
    if path.endswith("trainable_tokens_delta"):
        return "tokens"
    if path.endswith(".base_layer.weight"):
        return "copy"
    if saved:
        return "modules_to_save"
    if path.endswith(".bias") and config.bias != "none":
        return "bias"
    # Embeddings that were resized are saved whole, under their own name.
    if path.endswith((".weight", ".bias")):
        return "modules_to_save"
    return None


def _check(where: Path, config: LoraConfig, updates: dict[str, Update], unknown: list[str]) -> None:
    problems = [f"{name}: nothing in the configuration explains it" for name in unknown]
    for option, attribute, noun in (
        (config.lora_bias, "bias", "a bias of B (lora_bias)"),
        (config.use_dora, "magnitude", "a magnitude (use_dora)"),
    ):
        # One layer type may refuse the option; no layer at all having it is another adapter's configuration.
        have = [path for path, update in updates.items() if getattr(update, attribute) is not None]
        if have and not option:
            problems.append(f"{have[0]} has {noun}, and the configuration does not ask for it")
        elif option and len(have) < len(updates):
            lacking = next(path for path in updates if path not in have)
            problems.append(f"{lacking} lacks {noun}, and the configuration asks for it")
    broken = [path for path, update in updates.items() if not update.is_finite()]
    problems += [f"{path} holds NaN or infinity" for path in broken]
    if problems:
        raise AdapterFileError(bullets(f"{where} does not fit its configuration:", problems, 10))


def variant_problem(source: Source, reasons: Mapping[str, str]) -> str | None:
    """Why an adapter of this variant or initialisation is nothing but its own library's, or None.

    Args:
        source: The adapter.
        reasons: Variant -> what a reader says of it, where it knows the variant.
    """
    name = variant_name(source.config)
    if name not in ("plain", "dora"):
        return reasons.get(name, f"it is of the variant {name}, which no other format has")
    return base_problem(source.config)


def base_problem(config: LoraConfig) -> str | None:
    """Why the factors in a file are not relative to the base that its configuration names, or None."""
    init = config.init_lora_weights
    if isinstance(init, str) and CHANGED_BASE.fullmatch(init.lower()):
        way = (
            "load it onto the original base with PeftModel.from_pretrained and save it again, which writes a "
            "plain adapter"
            if init.lower().startswith(("pissa", "olora"))
            else "it fits only that base"
        )
        return f"init_lora_weights={init!r} changed the base, to which its factors are relative: {way}"
    return None


def _unlike(values: dict[str, Any]) -> list[str]:
    """The keys whose value is not the most common one."""
    kinds = list(values.values())
    usual = max(set(kinds), key=kinds.count) if kinds else None
    return [key for key, value in values.items() if value != usual]
