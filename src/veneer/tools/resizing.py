"""Give a saved adapter another rank: the best truncation of every update, and what it costs."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..lora_file import FileUpdate, OpenLora, updates
from ..ops import low_rank
from ..spec import LoraSpec, alpha_of, restate
from .adapter_files import check_counts_from_base, check_fits, oriented, read, write
from .measuring import SizeReport, distance, needed, norm, relative, terms_of
from .requests import check_place, check_size


@dataclass(frozen=True)
class Resized:
    """What became of one module's update ``D``.

    Attributes:
        before: Its rank.
        after: Its new rank.
        error: ``‖D' − D‖ / ‖D‖`` in Frobenius norm, of the factors as they are stored; 0 if nothing changed.
    """

    before: int
    after: int
    error: float

    @property
    def rank(self) -> int:
        """That of the new adapter."""
        return self.after


@dataclass(frozen=True, kw_only=True)
class ResizeReport(SizeReport):
    """An adapter of another rank; its norm is that of all updates together, before."""

    modules: Mapping[str, Resized]


def resize_adapter(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
) -> ResizeReport:
    """Write an adapter of a smaller rank whose updates are the nearest to those of another.

    The ``k`` largest singular values of ``D = s·B A`` stay, which no other matrix of rank k comes nearer to.
    Every module keeps its strength s, so ``lora_alpha`` follows the rank. Modules whose rank is not above the
    new one stay as they are, bit for bit; so does all that is no factor.

    Args:
        directory: The adapter.
        output: Directory to write; it appears whole or not at all.
        rank: The largest rank that a module may have.
        energy: Give each module the smallest rank that keeps this share of ``Σσ²``.
        overwrite: Replace the adapter in a directory that holds files.

    Returns:
        Rank and error of each module.

    Raises:
        ConfigError: Not one of rank and energy was given, or it cannot be right.
        AdapterFileError: The adapter is missing, broken, no LoRA, not finite, or counts from a changed base.
        VeneerError: The output holds files already, is the adapter, or cannot be written.

    Source: Eckart and Young, Psychometrika 1 (1936).
    """
    check_size(rank, energy)
    place = Path(output)
    check_place(place, [Path(directory)], overwrite)
    lora = read(directory)
    check_counts_from_base(lora)
    ranks = None if energy is None else _ranks(lora, energy)
    tensors: dict[str, Tensor] = {}
    specs: dict[str, LoraSpec] = {}
    modules: dict[str, Resized] = {}
    whole: list[float] = []
    lost: list[float] = []
    for update in updates(lora):
        spec = update.spec
        most = rank or (ranks or {})[spec.path]
        new = specs[spec.path] = _of_rank(spec, min(most, spec.r))
        made = update if new.r == spec.r else oriented(lora, update, partial(_truncated, new=new))
        tensors |= made.stored()
        before = terms_of(update)
        whole.append(norm(before))
        lost.append(0.0 if made is update else distance(before, terms_of(made)))
        modules[update.path] = Resized(spec.r, new.r, relative(lost[-1], whole[-1]))
    config = copy.deepcopy(lora.config)
    restate(config, specs.values())
    config.init_lora_weights = True
    tensors = {name: tensors.get(name, tensor) for name, tensor in lora.file.tensors().items()}
    write(place, overwrite, tensors, config, lora)
    total = math.hypot(*whole)
    notes: tuple[str, ...] = ()
    if lora.config.use_dora:
        notes = ("the magnitudes of DoRA stay as they are; errors are those of the update before them",)
    error = relative(math.hypot(*lost), total)
    return ResizeReport(directory=place, modules=modules, norm=total, error=error, notes=notes)


def _of_rank(spec: LoraSpec, rank: int) -> LoraSpec:
    return replace(spec, r=rank, lora_alpha=alpha_of(spec.scaling, rank, spec.use_rslora))


def _ranks(lora: OpenLora, energy: float) -> dict[str, int]:
    """The rank of each module; what is adapted inside a wrapper has that of the wrapper."""
    found: dict[str, int] = {}
    for update in updates(lora):
        rank = needed([low_rank.spectrum(b, a) for b, a in update.pairs()], energy)
        found[update.spec.path] = max(found.get(update.spec.path, 0), rank)
    return found


def _truncated(update: FileUpdate, new: LoraSpec) -> FileUpdate:
    old = update.spec
    cut = [low_rank.compress([(b, a, old.scaling / new.scaling)], new.r)[:2] for b, a in update.pairs()]
    return check_fits(update.with_pairs(cut, new))
