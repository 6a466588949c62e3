"""An adapter from what training changed in a whole model: the best low-rank update of every weight."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import layers
from ..base_fingerprint import BLOCK, FINGERPRINT, sizes_of
from ..config import LoraConfig
from ..errors import CheckpointError, CombineError, ConfigError, Hint
from ..files.fingerprint import fingerprint
from ..files.keys import PREFIX
from ..inject.stacks import names_of_parameters
from ..layers import LoraLayer
from ..module_names import portable_saved, portable_targets
from ..ops import low_rank
from ..ops.merging import is_finite
from ..ops.svd import truncated_svd
from ..spec import resolve_all, restate
from ..training.merge_files import OF_TOKENIZER, width
from ..training.model_files import ModelFiles, open_model
from ..training.progress import Progress, Silent
from ..wording import listed
from .adapter_files import write_new
from .extract_report import Extracted, ExtractReport, LeftOut
from .measuring import relative
from .places import Places
from .requests import check_place, check_size
from .tuned_model import change_of, check_alike, other_options

_DTYPES = ("float32", "bfloat16", "float16")


def extract_adapter(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    whole: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write an adapter that makes of a base model what full training made of it.

    For every weight that differs, ``B A`` is the nearest matrix of its rank to ``ΔW = W_tuned − W_base``; the
    scale is 1. Linear layers, embeddings and convolutions get factors, and so do stacks of experts and the
    matrices that choose among them, as ``target_parameters``, however the files hold the experts. Norms and
    other small modules are saved whole, as ``modules_to_save``, like the head of a classifier, and biases of
    adapted layers as ``bias="lora_only"`` has them. What an adapter cannot hold, such as other bare
    parameters, is listed in the report.

    Both models are read tensor by tensor: memory is that of the largest change, in float32, and of the
    adapter.

    Args:
        base: Directory or hub id of the base model.
        tuned: That of the trained model, of the same architecture and the same shapes.
        output: Directory to write; it appears whole or not at all.
        rank: The largest rank that a module may have.
        energy: Give each module the smallest rank that keeps this share of ``Σσ²``; of a stack, of every
            expert's.
        dtype: Type of the factors: "float32", "bfloat16" or "float16".
        whole: False leaves out what is no factor, as many programs read factors only.
        overwrite: Replace the adapter in a directory that holds files.
        progress: Told of each tensor.

    Returns:
        Rank and error of each module, and what is saved in another way or left out.

    Raises:
        ConfigError: Options that cannot be right.
        CheckpointError: The files are missing or broken, the models are not two states of one model (lists
            everything that differs), a weight is not finite, or no weight differs.
        TrainingError: transformers cannot make the model from its configuration, or it is quantised.
        VeneerError: The output holds files already, is one of the models, or cannot be written.

    Source: Eckart and Young, Psychometrika 1 (1936).
    """
    check_size(rank, energy)
    if dtype not in _DTYPES:
        raise ConfigError(Hint("dtype"), f" is one of {', '.join(_DTYPES)}, not {dtype!r}")
    place = Path(output)
    check_place(place, [Path(base), Path(tuned)], overwrite, "model")
    first, second = open_model(base, progress), open_model(tuned, progress)
    check_alike(first, second)
    work = _Work(
        first, second, partial(truncated_svd, rank=rank, energy=energy), getattr(torch, dtype), whole
    )
    bar = (progress or Silent()).bar("tensors", len(first.names))
    with bar as advance:
        for name in first.names:
            work.take(name)
            advance(1, "")
    work.finish()
    config = work.config(os.fspath(base))
    metadata = {FINGERPRINT: json.dumps(work.fingerprint())}
    write_new(place, overwrite, work.tensors, config, {second.place: [OF_TOKENIZER]}, metadata)
    return work.report(place)


@dataclass
class _Work:
    base: ModelFiles
    tuned: ModelFiles
    cut: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dtype: torch.dtype
    keeps_whole: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    stacks: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    modules: dict[str, Extracted] = field(default_factory=dict)
    biased: dict[str, float] = field(default_factory=dict)
    saved: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    unchanged: int = 0

    def __post_init__(self) -> None:
        self.places = Places(self.base)
        self.whole: dict[str, int] = {}

    def take(self, name: str) -> None:
        """Compare one tensor, and keep what the adapter holds of its change."""
        delta = change_of(self.base, self.tuned, name)
        if delta is None:
            self.unchanged += 1
            return
        if not is_finite(delta):
            self.broken.append(name)
            return
        path, _, attribute = name.rpartition(".")
        change, layer = float(torch.linalg.vector_norm(delta)), self.places.layer(path)
        reason = self.places.unfit(name, self.keeps_whole)
        if reason is not None:
            self.left_out[name] = LeftOut(_bytes(self.tuned.entry(name)), change, reason)
        elif name in self.places.bare:
            self._adapt_parameter(path, attribute, delta, change)
        elif layer is None:
            self.saved[name] = change
        elif attribute == "bias":
            self.biased[name] = change
        else:
            self._adapt(path, layer, delta, change)

    def _adapt(self, path: str, layer: type[LoraLayer], delta: Tensor, norm: float) -> None:
        matrix = delta.T if layer.transposed else delta.flatten(1)
        a, b, self.modules[path] = self._factorised([matrix], norm)
        self._put(path, layer, a, b)
        if path == self.places.embedding:
            for other in self.places.heads:  # a head shares the weight, and reads it the other way round
                own = layers.find(self.places.sites[other].module)
                self._put(other, own or layer, *((a, b) if own is layer else (b.T, a.T)))

    def _adapt_parameter(self, path: str, attribute: str, delta: Tensor, norm: float) -> None:
        stack = delta if delta.dim() == 3 else delta[None]
        if delta.dim() == 3 and getattr(self.places.bases[path], "is_transposed", False):
            stack = stack.transpose(1, 2)
        name = f"{path}.{attribute}"
        a, b, self.modules[name] = self._factorised(stack, norm)
        self.stacks.setdefault(path, {})[attribute] = a, b
        self._check(name, a, b)

    def _factorised(self, matrices: Iterable[Tensor], norm: float) -> tuple[Tensor, Tensor, Extracted]:
        """A (E·r, in) and B (out, r·E) of the changes (out, in) of E experts, which are written over."""
        pairs = [(matrix, self.cut(matrix)) for matrix in matrices]
        rank = max(len(s) for _, (_, s, _) in pairs)
        found, missed = [], []
        for matrix, cut in pairs:
            u, s, vh = cut if len(cut[1]) == rank else self.cut(matrix, rank=rank, energy=None)
            b, a = (factor.to(self.dtype) for factor in low_rank.cut(u, s, vh, rank)[:2])
            found.append((a, b))
            missed.append(
                float(torch.linalg.matrix_norm(matrix.addmm_(b.to(matrix), a.to(matrix), alpha=-1)))
            )
        a, b = torch.cat([a for a, _ in found]), torch.stack([b for _, b in found], dim=-1).flatten(1)
        return a, b, Extracted(rank, norm, relative(math.hypot(*missed), norm))

    def _check(self, name: str, *factors: Tensor) -> None:
        if not all(map(is_finite, factors)):
            raise CombineError(
                f"{name}: the factors leave the range of {self.dtype}; write them with ",
                Hint("dtype", "float32"),
            )

    def _put(self, path: str, layer: type[LoraLayer], a: Tensor, b: Tensor) -> None:
        self._check(path, a, b)
        shapes = layer.shapes(self.places.sites[path].module, len(a))
        for name, tensor, shape in zip(layer.factor_names, (a, b), shapes, strict=True):
            ending = "" if layer.lookup else ".weight"
            self.tensors[f"{PREFIX}{path}.{name}{ending}"] = tensor.reshape(shape).contiguous()

    def _put_stacks(self) -> None:
        """The factors of parameters, by the names of layers that are wrapped one around the other."""
        for path, pairs in self.stacks.items():
            inside = [name for name in self.places.bases[path]._parameters if name in pairs]
            for depth, name in enumerate(reversed(inside)):
                for role, factor in zip("AB", pairs[name], strict=True):
                    key = f"{PREFIX}{path}{'.base_layer' * depth}.lora_{role}.weight"
                    self.tensors[key] = factor.contiguous()

    def finish(self) -> None:
        """Add what has all of its parts now, and what is saved as it is.

        Raises:
            CheckpointError: Weights are not finite, or no module got an update.
        """
        if self.broken:
            raise CheckpointError(f"these weights hold NaN or infinity: {listed(self.broken, 10)}")
        self._put_stacks()
        if self.stacks:
            reason = "readers of adapter files do not agree on the names of biases beside adapted experts"
            for name, change in self.biased.items():
                self.left_out[name] = LeftOut(_bytes(self.tuned.entry(name)), change, reason)
            self.biased = {}
        for name in self.biased:
            path = name.rpartition(".")[0]
            if path not in self.modules:  # the bias of an adapted layer goes with it
                layer = self.places.layer(path)
                assert layer is not None
                a, b = (torch.zeros(shape) for shape in layer.shapes(self.places.sites[path].module, 1))
                self._put(path, layer, a.to(self.dtype), b.to(self.dtype))
                self.modules[path] = Extracted(1, 0.0, 0.0)
        if not self.modules:
            changed = len(self.saved) + len(self.left_out)
            raise CheckpointError(
                f"{self.base.place} and {self.tuned.place} "
                + (
                    f"differ in {changed} tensor{'s' * (changed > 1)}, none of which LoRA adapts: "
                    if changed
                    else "are equal: "
                )
                + listed([*self.saved, *self.left_out] or ["there is nothing to extract"])
            )
        if self.biased:
            for path in self.modules:
                if f"{path}.bias" in self.tuned.stored:
                    self._keep(f"{path}.bias", f"{path}.base_layer.bias")
        for path in self.places.saved_whole(self.saved):
            for attribute in self.places.sites[path].module.state_dict():
                if f"{path}.{attribute}" in self.tuned.stored:
                    self._keep(f"{path}.{attribute}", f"{path}.{attribute}")

    def _keep(self, name: str, as_name: str) -> None:
        self.tensors[f"{PREFIX}{as_name}"] = self.tuned.read(name).clone()
        self.whole[name] = _bytes(self.tuned.entry(name))

    def config(self, base: str) -> LoraConfig:
        """The adapter's configuration, which names exactly its modules."""
        targets = [path for path in self.places.sites if path in self.modules]
        tied = bool(self.places.heads) and self.places.embedding in self.modules
        if tied and not self.places.embedding.endswith("embed_tokens"):
            targets.append(self.places.heads[-1])  # PEFT knows the embedding by its name, or by the head
        paths = [path for path in self.places.sites if path]
        config = LoraConfig(
            r=1,
            lora_alpha=1,
            task_type=self.places.task,
            target_modules=portable_targets(targets, [path for path in paths if path not in targets]),
            target_parameters=names_of_parameters(self.places.bare & self.modules.keys(), self.places.bases)
            or None,
            modules_to_save=portable_saved([], self.places.saved_whole(self.saved), paths) or None,
            bias="lora_only" if self.biased else "none",
            fan_in_fan_out=any(type(self.places.sites[path].module).__name__ == "Conv1D" for path in targets),
            ensure_weight_tying=tied,
            base_model_name_or_path=base,
            inference_mode=True,
        )
        specs = resolve_all(config, "default", dict.fromkeys(self.modules, ""))
        ranks = {path: module.rank for path, module in self.modules.items()}
        restate(config, [replace(s, r=ranks[path], lora_alpha=ranks[path]) for path, s in specs.items()])
        return config

    def fingerprint(self) -> dict[str, Any]:
        """That of the base, as an adapter that was trained on it has it."""
        matrices = {
            path: partial(self.base.read, f"{path}.weight")
            for path, site in self.places.sites.items()
            if f"{path}.weight" in self.base.stored
            and getattr(site.module._parameters.get("weight"), "ndim", 0) > 1
        }
        adapted = {path: read for path, read in matrices.items() if path in self.modules}
        others = {p: read for p, read in matrices.items() if p not in adapted and BLOCK.search(p)}
        vocabulary, sizes = sizes_of(self.base.model)
        name = type(self.base.model).__name__
        return fingerprint(name, vocabulary, adapted, others=others, sizes=sizes)

    def report(self, place: Path) -> ExtractReport:
        changes = [module.norm for module in self.modules.values()]
        missed = [module.norm * module.error for module in self.modules.values()]
        lost = [tensor.norm for tensor in self.left_out.values()]
        norm = math.hypot(*changes, *self.biased.values(), *self.saved.values(), *lost)
        order = {path: number for number, path in enumerate(self.places.sites)}
        modules = dict(
            sorted(self.modules.items(), key=lambda m: order.get(m[0], order.get(m[0].rpartition(".")[0], 0)))
        )
        return ExtractReport(
            directory=place,
            modules=modules,
            whole=self.whole,
            left_out=self.left_out,
            unchanged=self.unchanged,
            norm=norm,
            error=relative(math.hypot(*missed, *lost), norm),
            notes=other_options(self.base, self.tuned),
        )


def _bytes(entry: tuple[str, tuple[int, ...]]) -> int:
    kind, shape = entry
    return math.prod(shape) * width(kind)
