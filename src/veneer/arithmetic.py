"""Combining adapters, defined on the update: ``ΔW = Σ wᵢ sᵢ BᵢAᵢ``.

A sum of low-rank updates is itself low-rank, so it is exact by concatenating factors, and reduced to
a given rank by QR and a small SVD, never by the dense product. The methods that trim and vote (ties, dare,
magnitude_prune) work entry by entry, so they do not depend on the sum alone: they work on the entries of the
factors, as PEFT defines them, or, with ``_svd``, on those of the dense updates, which are then cut to a rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer import variants
from veneer.adapters import as_names
from veneer.errors import CombineError, Text, show
from veneer.inits import InitResult
from veneer.layers import LoraLayer
from veneer.ops import low_rank, pruning
from veneer.ops.merging import is_finite
from veneer.spec import LoraSpec
from veneer.wording import bullets, span, warn

#: What `combine` can do. The first three are the same exact sum; they differ in the rank of the result.
COMBINATIONS = ("linear", "cat", "svd", *pruning.METHODS, *(f"{name}_svd" for name in pruning.METHODS))


@dataclass(frozen=True)
class CombineReport:
    """Ranks and errors of combined adapters.

    Attributes:
        combination_type: One of `COMBINATIONS`.
        ranks: Rank of the result, by module path.
        errors: ``‖ΔW' − ΔW‖ / ‖ΔW‖``, by module path; zero (up to rounding) where no rank was cut.
    """

    combination_type: str
    ranks: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        return (
            f"{self.combination_type}: {len(self.ranks)} modules, rank {span(self.ranks.values())}, "
            f"relative error of the update at most {self.worst:.2%}"
        )


@dataclass(frozen=True)
class Trim:
    """How entries are combined by the methods of `veneer.ops.pruning`."""

    method: str
    density: float
    majority_sign_method: str

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return pruning.combine(tensors, weights, self.method, self.density, self.majority_sign_method)


class Share(NamedTuple):
    """One adapter's update of a module: its factors, how strong it is, and the weight it is given."""

    b: Tensor
    a: Tensor
    scaling: float
    weight: float

    @property
    def strength(self) -> float:
        """What its product is multiplied with."""
        return self.weight * self.scaling


@dataclass(frozen=True)
class Combined:
    """One module's combined factors, not stored yet."""

    layer: LoraLayer
    spec: LoraSpec
    start: InitResult
    error: float


def combine(
    layers: Mapping[str, LoraLayer],
    adapters: str | Sequence[str],
    weights: float | Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> tuple[list[Combined], CombineReport]:
    """Factors of ``Σ wᵢ ΔWᵢ`` for every layer that holds one of the adapters. Nothing is stored.

    ``"linear"`` and ``"cat"`` are exact: their rank is the sum of the ranks (that of one adapter where
    there is only one). ``"svd"`` keeps the ``svd_rank`` largest singular values (by default the largest
    rank among the adapters) and reports what was cut.

    ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"`` combine the factors entry by
    entry (adapters of one rank only), with ``√|wᵢ sᵢ|`` on each factor. With ``_svd`` behind the name they
    combine the updates themselves, and keep the ``svd_rank`` largest singular values.

    Args:
        layers: Low-ranked layers by path.
        adapters: Names of the adapters, without repetition; one name may stand alone.
        weights: One number for each adapter (Python, numpy, or a tensor without dimensions); negative ones
            subtract.
        adapter_name: Name of the result.
        combination_type: One of `COMBINATIONS`.
        svd_rank: Rank of the result of "svd" and of the forms that end in it.
        density: Share of the entries that trimming keeps, in [0, 1].
        majority_sign_method: How ties and dare_ties vote: "total" or "frequency".

    Returns:
        The combined factors and the report.

    Raises:
        CombineError: Listing everything that makes the combination impossible or wrong.
    """
    adapters = [adapters] if isinstance(adapters, str) else list(adapters)
    names = as_names(adapters)
    numbers = [_number(w) for w in _as_list(weights)]
    problems = _problems(layers, adapters, numbers, weights, combination_type, svd_rank)
    problems += _pruning_problems(layers, names, combination_type, density, majority_sign_method)
    if problems:
        raise CombineError(bullets("these adapters cannot be combined:", problems))
    if svd_rank is not None and not combination_type.endswith("svd"):
        warn(f"{combination_type!r} cuts nothing, so svd_rank={svd_rank} has no effect")
    by_name = {n: w for n, w in zip(names, numbers, strict=True) if w is not None}
    trim = Trim(combination_type.removesuffix("_svd"), density or 0.0, majority_sign_method)
    result, ranks, errors = [], {}, {}
    for path, layer in layers.items():
        present = [n for n in names if n in layer.held_adapters]
        if not present:
            continue
        combined = _combine_layer(
            path, layer, {n: by_name[n] for n in present}, adapter_name, combination_type, svd_rank, trim
        )
        result.append(combined)
        ranks[path], errors[path] = combined.spec.r, combined.error
        new = (combined.start.a, combined.start.b, combined.start.bias)
        if not all(tensor is None or is_finite(tensor) for tensor in new):
            problems.append(f"{path}: the new factors leave the range of {combined.start.a.dtype}")
    if problems:
        raise CombineError(bullets("these adapters cannot be combined:", problems))
    return result, CombineReport(combination_type, ranks, errors)


def with_equal_biases(results: Sequence[Combined]) -> list[Combined]:
    """If any layer has a ``lora_bias``, give the others one of zeros: the option applies to all layers.

    Raises:
        CombineError: If a layer that cannot have one, such as an embedding, is among them.
    """
    if not any(c.spec.lora_bias for c in results):
        return list(results)
    filled, problems = [], []
    for combined in results:
        spec, start = replace(combined.spec, lora_bias=True), combined.start
        if reason := combined.layer.refuses(combined.layer.geometry(), spec):
            problems.append(Text(f"{spec.path}: ", reason, ", and another of the layers has a lora_bias"))
        elif start.bias is None:
            start = replace(start, bias=start.b.new_zeros(start.b.shape[0]))
        filled.append(replace(combined, spec=spec, start=start))
    if problems:
        raise CombineError(bullets("these adapters cannot be combined:", problems))
    return filled


def _as_list(weights: object) -> list[object]:
    """The weights one by one; a lone number stands for itself."""
    if isinstance(weights, Iterable) and not isinstance(weights, str) and getattr(weights, "ndim", 1) > 0:
        return list(weights)
    return [weights]


def _number(weight: Any) -> float | None:
    """A weight as a float, or None if it is not a finite real number; booleans are not."""
    dtype = str(getattr(weight, "dtype", "")).removeprefix("torch.")
    if dtype.startswith(("bool", "complex")) or getattr(weight, "ndim", 0) > 0:
        return None
    if isinstance(weight, bool | str | bytes):
        return None
    try:
        number = float(weight.detach() if isinstance(weight, Tensor) else weight)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _problems(
    layers: Mapping[str, LoraLayer],
    adapters: Sequence[str],
    numbers: Sequence[float | None],
    weights: object,
    combination_type: str,
    svd_rank: int | None,
) -> list[str]:
    found = []
    if combination_type not in COMBINATIONS:
        found.append(
            f"combination_type={combination_type!r} does not exist in this version; it has: "
            f"{', '.join(COMBINATIONS)}"
        )
    if not adapters:
        found.append("no adapter was named")
    if len(set(adapters)) != len(adapters):
        found.append("an adapter is named twice: add its weights up instead")
    if len(numbers) != len(adapters):
        found.append(f"{len(adapters)} adapters but {len(numbers)} weights")
    if None in numbers:
        found.append(f"weights must be finite numbers, got {weights!r}")
    if svd_rank is not None and (type(svd_rank) is not int or svd_rank < 1):
        found.append(f"svd_rank must be a positive integer, got {svd_rank!r}")
    for name in as_names(adapters):
        held = {path: layer for path, layer in layers.items() if name in layer.held_adapters}
        if not held:
            found.append(f"no adapter named {show(name)}")
        kinds = {layer.specs[name].variant for layer in held.values()}
        for kind in kinds:
            if not variants.get(kind).additive:
                found.append(
                    f"{name!r} is a {kind} adapter: its effect is not a sum of updates, so there is no "
                    "exact sum"
                )
        found += [f"{path}: {why}" for path, layer in held.items() if (why := layer.refuses_combination())]
        grouped = [path for path, layer in held.items() if not layer.is_matrix()]
        if grouped and combination_type.endswith("svd"):
            found.append(f"{grouped[0]} has groups: its update has no single pair of factors; use 'cat'")
    return found


def _pruning_problems(
    layers: Mapping[str, LoraLayer],
    names: Sequence[str],
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> list[str]:
    """Reasons why a method that works entry by entry cannot combine these adapters."""
    method = combination_type.removesuffix("_svd")
    if method not in pruning.METHODS:
        if density is None:
            return []
        return [f"density belongs to {', '.join(pruning.METHODS)}, not to {combination_type!r}"]
    found = pruning.refused(method, density, majority_sign_method)
    for path, layer in layers.items():
        present = [n for n in names if n in layer.held_adapters]
        ranks = {n: layer.specs[n].r for n in present}
        if method == combination_type and len(set(ranks.values())) > 1:
            listed = ", ".join(f"{n!r} has {r}" for n, r in ranks.items())
            found.append(
                f"{method} combines factors of one rank, and on {path} {listed}: use {method + '_svd'!r}"
            )
            break
    every = [(n, layer) for n in names for layer in layers.values() if n in layer.held_adapters]
    subtracted = [n for n, layer in every if layer.residual(n) is not None]
    if subtracted and method == combination_type:
        found.append(
            f"{method} works on factors, but the update of {subtracted[0]!r} is their product minus its "
            f"start: use {method + '_svd'!r}"
        )
    biased = [n for n, layer in every if layer.lora_bias[n]]
    if biased:
        found.append(f"{biased[0]!r} has a lora_bias, which {method} cannot combine: use 'cat'")
    return found


@torch.no_grad()
def _combine_layer(
    path: str,
    layer: LoraLayer,
    weights: Mapping[str, float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
    trim: Trim,
) -> Combined:
    parts = {n: layer.update_factors(n) for n in weights}
    wide: dict[str, tuple[Any, ...]] = {
        n: tuple(None if t is None else _wide(t) for t in part) for n, part in parts.items()
    }
    strengths = {n: w * layer.scaling[n] for n, w in weights.items()}
    biases = [strengths[n] * part[2] for n, part in wide.items() if part[2] is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    error = 0.0
    shares = [Share(b, a, layer.scaling[n], weights[n]) for n, (a, b, _) in wide.items()]
    if combination_type.endswith("svd"):
        widest = max(layer.r[n] * (1 if layer.residual(n) is None else 2) for n in weights)
        rank = svd_rank or widest
        matrices = [Share(*layer.matrices(s.a, s.b), s.scaling, s.weight) for s in shares]
        b, a, error = low_rank.cut(*decomposed(matrices, combination_type, trim), rank)
    elif combination_type in pruning.METHODS:
        a, b = trimmed_factors(shares, trim)
        rank = layer.specs[next(iter(weights))].r
    else:
        a, b = _concatenated(layer, wide, strengths)
        rank = a.shape[0]
    shape_a, shape_b = layer.shapes(layer.geometry(), rank)
    first = layer.specs[next(iter(weights))]
    # The factors already contain the strengths, so the scaling of the result is 1.
    spec = replace(
        first, adapter=adapter_name, path=path, r=rank, lora_alpha=float(rank), use_rslora=False,
        lora_bias=bias is not None, lora_dropout=0.0, init=True, init_config=None,
    )  # fmt: skip
    dtype = parts[first.adapter][0].dtype
    start = InitResult(
        a.reshape(shape_a).to(dtype), b.reshape(shape_b).to(dtype), None if bias is None else bias.to(dtype)
    )
    return Combined(layer, spec, start, error)


def decomposed(shares: Sequence[Share], combination_type: str, trim: Trim) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of what a type that ends in "svd" makes of the updates of a matrix.

    Returns:
        ``U: (out, k)``, ``S: (k,)`` descending, ``Vh: (k, in)``.
    """
    if combination_type == "svd":
        return low_rank.svd([(share.b, share.a, share.strength) for share in shares])
    # An update is scaled before the vote and weighted after it.
    dense = [share.scaling * (share.b @ share.a) for share in shares]
    total = trim(dense, [share.weight for share in shares])
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return u, s, vh


def trimmed_factors(shares: Sequence[Share], trim: Trim) -> tuple[Tensor, Tensor]:
    """(A, B), combined entry by entry from factors of one rank, with ``√|wᵢ sᵢ|`` on each."""
    roots = [math.sqrt(abs(share.strength)) for share in shares]
    signed = [math.copysign(root, share.strength) for root, share in zip(roots, shares, strict=True)]
    return trim([share.a for share in shares], signed), trim([share.b for share in shares], roots)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _concatenated(
    layer: LoraLayer, parts: Mapping[str, tuple[Any, ...]], strengths: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Stack the factors along the rank, group by group where the layer has groups."""
    groups = int(getattr(layer.geometry(), "groups", 1))
    a_chunks = [[chunk for chunk in part[0].chunk(groups)] for part in parts.values()]
    a = torch.cat([chunks[g] for g in range(groups) for chunks in a_chunks])
    b = torch.cat([strengths[n] * part[1] for n, part in parts.items()], dim=1)
    return a, b
