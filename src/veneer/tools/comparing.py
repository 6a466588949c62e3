"""What two saved adapters share: options, tensors, and the directions of their updates."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integrations.export.source import base_problem
from ..lora_file import FileUpdate, OpenLora, factor_names, updates
from ..ops import low_rank
from .adapter_files import read
from .measuring import Terms, distance, needed, norm, relative, terms_of
from .requests import check_size


@dataclass(frozen=True)
class Angles:
    """Between the directions of two updates, on one side of a weight.

    Attributes:
        degrees: The principal angles, ascending: 0 is a direction that both have.
        shared: Mean of their squared cosines: 1 if one side's directions contain the other's.
        chance: What ``shared`` is on average for directions that were drawn at random.

    Source: Björck and Golub, Math. Comp. 27 (1973), for the angles; Hu et al., LoRA (2021), equation 4.
    """

    degrees: tuple[float, ...]
    shared: float
    chance: float


@dataclass(frozen=True)
class ModuleDifference:
    """The updates ``D₁`` and ``D₂`` of one module.

    Attributes:
        ranks: Their ranks, as configured.
        norms: Their Frobenius norms.
        distance: ``‖D₁ − D₂‖`` in units of the larger norm: 0 if they are equal, 2 if they are opposite.
        cosine: ``⟨D₁, D₂⟩ / (‖D₁‖ ‖D₂‖)``; None where one of them is 0.
        inputs: Between what they read; None where one of them is 0, or they belong to several experts.
        outputs: Between what they write.
    """

    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float
    cosine: float | None
    inputs: Angles | None
    outputs: Angles | None


@dataclass(frozen=True)
class AdapterDifference:
    """Two adapters, side by side.

    Attributes:
        options: Option of the configuration -> its values, where they differ.
        modules: Module path -> how the updates differ, of modules that both adapt.
        only: Modules that only the first adapts, and only the second.
        shapes: Module path -> the shapes ``(out, in)`` of updates that cannot be compared.
        others: Names of other tensors that are not the same in both.
        identical: Number of tensors that are equal bit for bit, their types included.
        tensors: Numbers of tensors.
        notes: What else is to be known.
    """

    options: Mapping[str, tuple[Any, Any]]
    modules: Mapping[str, ModuleDifference]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    shapes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    others: tuple[str, ...]
    identical: int
    tensors: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def same_updates(self) -> bool:
        """Whether both change every weight in the same way, exactly."""
        apart = [*self.only[0], *self.only[1], *self.shapes, *self.others]
        return not apart and all(module.distance == 0.0 for module in self.modules.values())


def compare_adapters(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, energy: float = 0.99
) -> AdapterDifference:
    """Compare two saved adapters, from their files alone, one module at a time.

    Args:
        first: Directory of an adapter.
        second: Directory of another one.
        energy: The angles are those between the directions that hold this share of ``Σσ²`` of each update.

    Raises:
        ConfigError: energy is no share.
        AdapterFileError: One is missing, broken, no LoRA, or not finite.
    """
    check_size(None, energy)
    one, two = read(first), read(second)
    theirs = {update.path: update for update in updates(two)}
    modules, shapes, found = {}, {}, set()
    for mine in updates(one):
        other = theirs.get(mine.path)
        if other is None:
            continue
        found.add(mine.path)
        sizes = _size(mine), _size(other)
        if sizes[0] == sizes[1]:
            modules[mine.path] = _difference(mine, other, energy)
        else:
            shapes[mine.path] = (sizes[0][1:], sizes[1][1:])
    only = tuple(tuple(path for path in lora.specs if path not in found) for lora in (one, two))
    identical, others = _tensors(one, two)
    return AdapterDifference(
        _options(one, two),
        modules,
        (only[0], only[1]),
        shapes,
        others,
        identical,
        (len(one.file.shapes), len(two.file.shapes)),
        tuple(_notes(one, two)),
    )


def _notes(*adapters: OpenLora) -> Iterator[str]:
    for lora in adapters:
        where = lora.file.path.parent
        if problem := base_problem(lora.config):
            yield f"{where}: {problem}"
        if lora.config.use_dora:
            yield f"{where} is a DoRA: its updates are compared before their magnitudes"


def _size(update: FileUpdate) -> tuple[int, int, int]:
    """(experts, out, in) of an update."""
    pairs = update.pairs()
    return len(pairs), pairs[0][0].shape[0], pairs[0][1].shape[1]


def _difference(one: FileUpdate, two: FileUpdate, energy: float) -> ModuleDifference:
    terms = terms_of(one), terms_of(two)
    norms = norm(terms[0]), norm(terms[1])
    same = one.spec.scaling == two.spec.scaling and all(map(_equal, one[3:], two[3:]))
    apart = 0.0 if same else relative(distance(*terms), max(norms))
    cosine = _inner(*terms) / (norms[0] * norms[1]) if all(norms) else None
    inputs, outputs = None, None
    if all(norms) and len(terms[0]) == 1:
        inputs, outputs = _angles(*terms, energy)
    return ModuleDifference((one.spec.r, two.spec.r), norms, apart, cosine, inputs, outputs)


def _inner(one: Terms, other: Terms) -> float:
    """Frobenius inner product ``⟨D₁, D₂⟩ = tr(D₁ᵀ D₂)`` of two updates of one module."""
    parts = [
        s1 * s2 * float(((b1.T @ b2) * (a1 @ a2.T)).sum())
        for (b1, a1, s1), (b2, a2, s2) in zip(one, other, strict=True)
    ]
    return math.fsum(parts)


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def _angles(one: Terms, two: Terms, energy: float) -> tuple[Angles, Angles]:
    """(between the inputs, between the outputs)."""
    sides = []
    for terms in (one, two):
        u, s, vh = low_rank.svd(terms)
        count = needed([s], energy)
        sides.append((vh[:count].T, u[:, :count]))
    return _between(sides[0][0], sides[1][0]), _between(sides[0][1], sides[1][1])


def _between(one: Tensor, two: Tensor) -> Angles:
    """The principal angles of two orthonormal bases (d, k) in float64."""
    product = one.T @ two
    cosines = torch.linalg.svdvals(product).clamp(max=1.0)
    # Small angles have no digits in their cosines: these come from what of one base lies outside the other.
    small, large = (one, two) if one.shape[1] <= two.shape[1] else (two, one)
    sines = torch.linalg.svdvals(small - large @ (large.T @ small)).flip(0).clamp(max=1.0)
    angles = torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos())
    degrees = tuple(math.degrees(angle) for angle in angles.tolist())
    chance = max(one.shape[1], two.shape[1]) / one.shape[0]
    return Angles(degrees, float(cosines.square().mean()), chance)


def _options(one: OpenLora, two: OpenLora) -> dict[str, tuple[Any, Any]]:
    values = [lora.config.to_json() for lora in (one, two)]
    names = dict.fromkeys([*values[0], *values[1]])
    pairs = {name: (values[0].get(name), values[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _tensors(one: OpenLora, two: OpenLora) -> tuple[int, tuple[str, ...]]:
    """(how many tensors are equal, names of those besides the factors that are not)."""
    common = one.file.shapes.keys() & two.file.shapes.keys()
    equal = {
        name for name in common if _equal(one.file.tensors([name])[name], two.file.tensors([name])[name])
    }
    rest = dict.fromkeys(name for lora in (one, two) for name in factor_names(lora.file)[1])
    return len(equal), tuple(name for name in rest if name not in equal)
