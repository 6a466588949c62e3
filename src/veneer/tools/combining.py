"""Add up saved adapters: one adapter whose updates are weighted sums of theirs, from their files."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import variants
from ..arithmetic import CombineReport, Share, Trim, decomposed, trimmed_factors
from ..base_fingerprint import FINGERPRINT
from ..config import LoraConfig
from ..errors import BaseMismatchError, CombineError
from ..files.fingerprint import compare_fingerprints
from ..files.keys import PREFIX
from ..lora_file import FileUpdate, OpenLora, factor_names, updates
from ..ops import low_rank
from ..spec import LoraSpec, restate, variant_name
from ..wording import bullets, listed, warn
from .adapter_files import check_counts_from_base, check_fits, is_turned, read, write
from .measuring import distance, needed, norm, relative, terms_of
from .requests import Request, check_place

#: Options that say which modules are adapted.
_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
#: Options that have to be the same in all adapters.
_ALIKE = ("fan_in_fan_out", "layer_replication", "ensure_weight_tying", "task_type")


def combine_adapters(
    adapters: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    combination_type: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    overwrite: bool = False,
) -> CombineReport:
    """Write the adapter whose updates are ``Σ wᵢ sᵢ BᵢAᵢ``, as `add_weighted_adapter` of a model does.

    ``"cat"`` puts the factors beside one another: the sum is exact, and its rank that of all together. With a
    rank or an energy, and with ``"svd"``, the largest singular values of the sum stay. The methods that trim
    and vote combine the factors entry by entry, or with ``_svd`` behind their name the updates. An adapter
    counts as zero in a module that it does not adapt.

    Args:
        adapters: Directories of adapters of one base, or a single one.
        output: Directory to write; it appears whole or not at all.
        weights: One number for each adapter; all 1 if None.
        combination_type: ``"cat"`` (or ``"linear"``), ``"svd"``, ``"ties"``, ``"dare_linear"``,
            ``"dare_ties"``, ``"magnitude_prune"``, or one of these four with ``_svd``.
        rank: The largest rank that a module of the result may have.
        energy: Give each module the smallest rank that keeps this share of ``Σσ²``.
        density: Share of the entries that trimming keeps.
        majority_sign_method: How ties and dare_ties vote: "total" or "frequency".
        overwrite: Replace the adapter in a directory that holds files.

    Returns:
        Rank of each module, and the error of its stored factors; of the methods that trim, that of the cut.

    Raises:
        ConfigError: Options that cannot be right; lists all of them.
        AdapterFileError: An adapter is missing, broken, no LoRA or not finite.
        CombineError: The adapters cannot be added; lists everything in the way.
        BaseMismatchError: They were made on different base models.
        VeneerError: The output holds files already, is one of the adapters, or cannot be written.
    """
    adapters = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    request = Request.of(
        len(adapters), weights, combination_type, rank, energy, density, majority_sign_method
    )
    place = Path(output)
    check_place(place, [Path(adapter) for adapter in adapters], overwrite)
    loras = [read(adapter) for adapter in adapters]
    _check(loras, request)
    groups: dict[str, dict[str, list[FileUpdate | None]]] = {}
    for number, lora in enumerate(loras):
        for update in updates(lora):
            own = groups.setdefault(update.spec.path, {}).setdefault(update.path, [None] * len(loras))
            own[number] = update
    tensors: dict[str, Tensor] = {}
    specs: list[LoraSpec] = []
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for group in groups.values():
        made, lost = _combined(group, loras, request)
        errors |= lost
        for update in made:
            tensors |= update.stored()
            ranks[update.path] = update.spec.r
        specs.append(made[0].spec)
    tensors |= _biases(groups, loras, request) | _copies(loras)
    write(place, overwrite, tensors, _config(loras, specs, tensors), loras[0], metrics=False)
    return CombineReport(request.combination_type, ranks, errors)


def _combined(
    group: Mapping[str, list[FileUpdate | None]], loras: Sequence[OpenLora], request: Request
) -> tuple[list[FileUpdate], dict[str, float]]:
    """(the updates of modules that get one rank together, their errors)."""
    trim = Trim(request.method, request.density or 0.0, request.majority_sign_method)
    parts: dict[str, list[tuple[Tensor, ...]]] = {}
    first: dict[str, FileUpdate] = {}
    for path, found in group.items():
        held = [(u, w) for u, w in zip(found, request.weights, strict=True) if u is not None]
        first[path] = held[0][0]._replace(
            a=_widest([u.a for u, _ in held]), b=_widest([u.b for u, _ in held])
        )
        turned = is_turned(loras[0], first[path])
        kind = torch.promote_types(
            torch.promote_types(first[path].a.dtype, first[path].b.dtype), torch.float32
        )
        stacks = [
            [
                Share(b.to(kind), a.to(kind), u.spec.scaling, w)
                for b, a in (u.turned() if turned else u).pairs()
            ]
            for u, w in held
        ]
        parts[path] = [_parts(list(shares), request, trim) for shares in zip(*stacks, strict=True)]
    size = max(_rank(part, request) for part in parts.values())
    made, errors = [], {}
    for path, own in parts.items():
        update = first[path]
        spec = replace(update.spec, r=size, lora_alpha=size, use_rslora=False)
        turned = is_turned(loras[0], update)
        like = update.turned() if turned else update
        pairs = [
            low_rank.cut(*part, size)[:2] if len(part) == 3 else _padded(part[0], part[1], size)
            for part in own
        ]
        done = like.with_pairs(pairs, spec)
        done = done.turned() if turned else done
        made.append(check_fits(done))
        errors[path] = _error(done, group[path], own, request)
    return made, errors


def _parts(shares: Sequence[Share], request: Request, trim: Trim) -> tuple[Tensor, ...]:
    """``(U, S, Vh)`` of the combined update of a matrix, or its factors ``(B, A)`` where no rank is cut."""
    if request.cuts:
        return decomposed(shares, request.combination_type, trim)
    if request.trims:
        a, b = trimmed_factors(shares, trim)
        return b, a
    return torch.cat([s.strength * s.b for s in shares], dim=1), torch.cat([s.a for s in shares])


def _rank(parts: Sequence[tuple[Tensor, ...]], request: Request) -> int:
    if not request.cuts:
        return int(parts[0][0].shape[1])
    values = [part[1] for part in parts]
    if request.energy is not None:
        return needed(values, request.energy)
    return min(request.rank or len(values[0]), len(values[0]))


def _padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - a.shape[0]
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))


def _error(
    made: FileUpdate,
    found: Sequence[FileUpdate | None],
    parts: Sequence[tuple[Tensor, ...]],
    request: Request,
) -> float:
    """The error of the stored update against the sum, or against what trimming made of it."""
    if request.trims:
        if not request.cuts:
            return 0.0
        squares = torch.stack([part[1].double().square() for part in parts])
        whole = float(squares.sum())
        return relative(float(squares[:, made.spec.r :].sum()) ** 0.5, whole**0.5)
    held = [(terms_of(u), w) for u, w in zip(found, request.weights, strict=True) if u is not None]
    stacked = [
        (
            torch.cat([w * s * b for (b, _, s), (_, w) in zip(experts, held, strict=True)], dim=1),
            torch.cat([a for _, a, _ in experts]),
            1.0,
        )
        for experts in zip(*(terms for terms, _ in held), strict=True)
    ]
    return relative(distance(stacked, terms_of(made)), norm(stacked))


def _widest(tensors: Sequence[Tensor]) -> Tensor:
    """The first tensor, in a type that holds the values of all."""
    kind = tensors[0].dtype
    for tensor in tensors:
        kind = torch.promote_types(kind, tensor.dtype)
    return tensors[0].to(kind)


def _check(loras: Sequence[OpenLora], request: Request) -> None:
    """Refuse adapters that cannot be added, and mention what may be an oversight.

    Raises:
        CombineError: Listing everything in the way.
        BaseMismatchError: They were made on different base models.
    """
    problems = []
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for lora in loras:
        where, config = lora.file.path.parent, lora.config
        check_counts_from_base(lora)
        kind = variant_name(config)
        if not variants.get(kind).additive:
            problems.append(f"{where} is of the variant {kind}: what it does is no sum of updates")
        rest = [name for name in factor_names(lora.file)[1] if not _is_summed(name, lora)]
        if rest:
            problems.append(f"{where} holds more than updates, which has no sum: {listed(rest)}")
        if config.lora_bias and request.trims:
            problems.append(f"{where} has a lora_bias, which {request.method} cannot combine: use 'cat'")
        unlike = [name for name in _ALIKE if getattr(config, name) != getattr(loras[0].config, name)]
        if unlike:
            problems.append(f"{where} and {loras[0].file.path.parent} differ in {', '.join(unlike)}")
        for update in updates(lora):
            (b, a), experts = update.pairs()[0], len(update.pairs())
            size = (
                experts,
                b.shape[0],
                a.shape[1],
                *((a.shape[0],) if request.trims and not request.cuts else ()),
            )
            before = shapes.setdefault(update.path, (str(where), size))
            if before[1] != size:
                problems.append(
                    f"{update.path}: {_sized(before[1])} in {before[0]}, {_sized(size)} in {where}"
                )
    problems += _changed_copies(loras)
    if problems:
        raise CombineError(bullets("these adapters cannot be combined:", problems, 10))
    _check_bases(loras)


def _sized(size: tuple[int, ...]) -> str:
    experts = f"{size[0]} times " if size[0] > 1 else ""
    return f"{experts}{size[1]}×{size[2]}" + (f" of rank {size[3]}" if len(size) > 3 else "")


def _is_summed(name: str, lora: OpenLora) -> bool:
    """Whether a tensor beside the factors has a sum: a bias of B, or a copy of the base's embedding."""
    path = name.removeprefix(PREFIX)
    return (
        path.removesuffix(".lora_B.bias") in lora.specs
        or path.removesuffix(".base_layer.weight") in lora.specs
    )


def _copies(loras: Sequence[OpenLora]) -> dict[str, Tensor]:
    names = {name: lora for lora in loras for name in lora.file.shapes if name.endswith(".base_layer.weight")}
    return {name: lora.file.tensors([name])[name] for name, lora in names.items()}


def _changed_copies(loras: Sequence[OpenLora]) -> list[str]:
    """Embeddings of the base that the adapters brought along, and do not have alike."""
    kept = _copies(loras)
    return [
        f"{lora.file.path.parent} carries another {name} than the others"
        for name, copied in kept.items()
        for lora in loras
        if name in lora.file.shapes and not torch.equal(lora.file.tensors([name])[name], copied)
    ]


def _check_bases(loras: Sequence[OpenLora]) -> None:
    first = loras[0]
    for lora in loras[1:]:
        texts = [one.file.metadata.get(FINGERPRINT) for one in (first, lora)]
        try:
            saved, present = (json.loads(text or "") for text in texts)
        except ValueError:  # an adapter of another library has none
            saved = present = None
        places = f"{first.file.path.parent} and {lora.file.path.parent}"
        if saved is not None:
            compared = compare_fingerprints(saved, present)
            if compared.severity == "wrong":
                raise BaseMismatchError(
                    f"{places} were made on different base models: {'; '.join(compared.problems)}"
                )
        names = [one.config.base_model_name_or_path for one in (first, lora)]
        if names[0] != names[1]:
            warn(f"{places} name different base models, {names[0]!r} and {names[1]!r}")


def _biases(
    groups: Mapping[str, Mapping[str, object]], loras: Sequence[OpenLora], request: Request
) -> dict[str, Tensor]:
    """The sums of the biases of B; zeros on modules where no adapter has one."""
    if not any(lora.config.lora_bias for lora in loras):
        return {}
    found: dict[str, Tensor] = {}
    for path in (path for group in groups.values() for path in group):
        name = f"{PREFIX}{path}.lora_B.bias"
        for lora, weight in zip(loras, request.weights, strict=True):
            if path not in lora.specs:
                continue
            out = lora.file.tensors([name])[name].float() if name in lora.file.shapes else None
            if out is None:
                factor = factor_names(lora.file)[0][path]["B"]
                out = torch.zeros(lora.file.shapes[factor][0])
            found[name] = found.get(name, torch.zeros_like(out)) + weight * lora.specs[path].scaling * out
    return found


def _config(
    loras: Sequence[OpenLora], specs: Sequence[LoraSpec], tensors: Mapping[str, Tensor]
) -> LoraConfig:
    config = copy.deepcopy(loras[0].config)
    restate(config, specs)
    config.lora_dropout, config.init_lora_weights = 0.0, True
    config.lora_bias = any(lora.config.lora_bias for lora in loras)
    if all(getattr(lora.config, name) == getattr(config, name) for lora in loras for name in _WHERE):
        return config
    named = [lora.config for lora in loras if isinstance(lora.config.target_modules, set | list)]
    free = all(getattr(lora.config, name) is None for lora in loras for name in _WHERE[1:])
    if free and len(named) == len(loras):
        config.target_modules = {name for one in named for name in one.target_modules or ()}
        return config
    parameters = [name for lora in loras for name in lora.config.target_parameters or ()]
    paths = "|".join(re.escape(spec.path) for spec in specs)
    config.target_modules = f"^(?:{paths})$"
    config.target_parameters = list(dict.fromkeys(parameters)) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config
