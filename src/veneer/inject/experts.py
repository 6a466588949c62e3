"""Adapters of experts that were modules of their own, for models that hold them as stacks."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer import layers, module_names
from veneer.config import LoraConfig
from veneer.errors import Hint, LoadMismatchError
from veneer.expert_layouts.layouts import STACKS
from veneer.expert_layouts.mixture import mixture_of
from veneer.files.keys import PREFIX
from veneer.inject.sites import model_type, sites
from veneer.inject.stacks import PARTS, holds_stacks
from veneer.spec import resolve_all
from veneer.wording import span, warn

_EXPERT = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(PARTS)})\.lora_([AB])\.weight")
_FACTOR = re.compile(r"(.*)\.lora_([AB])\.weight")

#: The keys of one stack in a file: by half, expert, and factor.
_Keys = dict[tuple[int, int, str], str]


class Source(NamedTuple):
    """A tensor of an adapter under its name of today: its shape, and how it comes of those in the file."""

    shape: tuple[int, ...]
    names: Sequence[str]
    make: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Stacked:
    """An adapter's file under the names of today.

    Attributes:
        config: The configuration, with the stacks among ``target_parameters``.
        sources: The tensors by their names of today.
    """

    config: LoraConfig
    sources: Mapping[str, Source]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by the names of today."""
        return {name: source.shape for name, source in self.sources.items()}

    def tensors(
        self, names: Iterable[str], read: Callable[[Iterable[str]], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors by their names of today; ``read`` gives those of the file."""
        wanted = {name: self.sources[name] for name in names}
        found = read(dict.fromkeys(name for source in wanted.values() for name in source.names))
        return {name: source.make(found) for name, source in wanted.items()}


def stacked(model: nn.Module, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> Stacked | None:
    """Read an adapter of single experts as one of their stacks; None where it is not that.

    Transformers 5 holds the experts of a layer in two parameters, ``gate_up_proj`` and ``down_proj``, where
    version 4 had a linear for each matrix of each expert. An expert's update stays what it was: gate and up,
    of rank r each, become one of rank 2r whose B is block-diagonal, and of the same strength.

    Raises:
        LoadMismatchError: If an expert is missing, or ranks differ between experts.
    """
    experts = _experts_in(shapes)
    bases = {path: site.base for path, site in sites(model).items()} if experts else {}
    moved = {old: new for old in experts if (new := _path_of_stacks(bases, old)) is not None}
    if not moved:
        return None
    mixture = mixture_of({"model_type": model_type(model)}, None)
    sources: dict[str, Source] = {}
    parameters = set(config.target_parameters or ())
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    taken = {key for old in moved for keys in experts[old].values() for key in keys.values()}
    first = (m[0] for m in map(_EXPERT.fullmatch, taken) if m is not None and int(m[2]) == 0)
    specs = resolve_all(config, "", {_module_of(key): "" for key in first})
    for old, new in moved.items():
        stacks = experts[old]
        path = new.removeprefix(PREFIX)
        for stack in (stack for stack in STACKS if stack in stacks):
            weight = bases[path]._parameters[stack]
            assert weight is not None
            count, size_out = len(weight), weight.shape[2 if mixture.transposed else 1]
            a, b = _factors_of_stack(
                new, stack, (count, size_out), stacks[stack], shapes, mixture.interleaved
            )
            # Of two stacks, the layer around `down_proj` lies around that of `gate_up_proj`.
            inner = ".base_layer" if len(stacks) == 2 and stack == "gate_up_proj" else ""
            sources[f"{new}{inner}.lora_A.weight"], sources[f"{new}{inner}.lora_B.weight"] = a, b
            parameters.add(f"{path}.{stack}")
            rank, spec = a.shape[0] // len(weight), specs[_module_of(a.names[0])]
            ranks[f"^{path}.{stack}$"] = rank
            alphas[f"^{path}.{stack}$"] = spec.scaling * (math.sqrt(rank) if spec.use_rslora else rank)
    # The modules around the experts may have been renamed with them.
    around = {old.removesuffix("experts"): new.removesuffix("experts") for old, new in moved.items()}
    modules = set()
    for key in (key for key in shapes if key not in taken):
        name = next((new + key[len(old) :] for old, new in around.items() if key.startswith(old)), key)
        sources[name] = Source(shapes[key], [key], itemgetter(key))
        if match := _FACTOR.fullmatch(name.removeprefix(PREFIX)):
            module = bases.get(match[1])
            weight = getattr(module, "weight", None)
            if module is not None and layers.find(module) is None and isinstance(weight, nn.Parameter):
                parameters.add(f"{match[1]}.weight")
            else:
                modules.add(match[1])
    own = copy.deepcopy(config)
    own.target_modules = module_names.portable_targets(modules, set(bases) - modules) if modules else []
    own.exclude_modules = own.layers_to_transform = own.layers_pattern = None
    own.target_parameters = sorted(parameters)
    own.rank_pattern, own.alpha_pattern = ranks, alphas
    if own.lora_dropout:
        warn(
            Hint("lora_dropout", own.lora_dropout),
            " is set to 0: the experts are bare parameters here, on which dropout is not defined",
        )
        own.lora_dropout = 0.0
    return Stacked(own, sources)


def _experts_in(keys: Iterable[str]) -> dict[str, dict[str, _Keys]]:
    """The keys of single experts, by the path of the experts and the stack that they belong to."""
    found: dict[str, dict[str, _Keys]] = {}
    for key in keys:
        if match := _EXPERT.fullmatch(key):
            stack, half = PARTS[match[3]]
            found.setdefault(match[1], {}).setdefault(stack, {})[half, int(match[2]), match[4]] = key
    return found


def _module_of(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".lora_")[0]


def _path_of_stacks(modules: Mapping[str, nn.Module], old: str) -> str | None:
    """Where a model holds the stacks of the experts of an old path; None if it does not."""
    for path in (old, old.replace(".block_sparse_moe.", ".mlp.")):
        module = modules.get(path.removeprefix(PREFIX))
        if module is not None and holds_stacks(module):
            return path
    return None


def _factors_of_stack(
    where: str,
    stack: str,
    sizes: tuple[int, int],
    keys: _Keys,
    shapes: Mapping[str, tuple[int, ...]],
    interleaved: bool,
) -> tuple[Source, Source]:
    """A and B of one stack of E matrices with ``out`` rows, ``sizes``, from those of its experts."""
    count, size_out = sizes
    halves = sorted({half for half, _, _ in keys})
    wanted = [(half, expert, factor) for half in halves for expert in range(count) for factor in "AB"]
    if absent := [entry for entry in wanted if entry not in keys]:
        raise LoadMismatchError(
            f"{where}: {len(absent)} of the {len(wanted)} factors of its experts are missing, such as "
            f"those of expert {absent[0][1]}; a stack takes an update for every expert"
        )
    ranks = {shapes[keys[entry]][0] for entry in wanted if entry[2] == "A"}
    if len(ranks) > 1:
        raise LoadMismatchError(f"{where}: ranks differ between experts ({sorted(ranks)})")
    a, b = ([[keys[half, expert, f] for half in halves] for expert in range(count)] for f in "AB")
    rank, size_in = count * len(halves) * ranks.pop(), shapes[a[0][0]][1]
    parts = len(STACKS[stack])
    length = size_out // parts
    own = {shapes[keys[entry]][0] for entry in wanted if entry[2] == "B"}
    if own != {length}:
        raise LoadMismatchError(
            f"{where}: the factors of its experts have {span(own)} rows, where {stack} takes {length}: the "
            "adapter was made for another base model"
        )
    rows = [
        slice(half, None, parts) if interleaved else slice(half * length, (half + 1) * length)
        for half in halves
    ]
    return (
        Source((rank, size_in), _flat(a), _joined_a(a)),
        Source((size_out, rank), _flat(b), _joined_b(b, size_out, rows)),
    )


def _flat(names: list[list[str]]) -> list[str]:
    return [key for expert in names for key in expert]


def _joined_a(names: list[list[str]]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """(E·k·r, in): the A of every expert, gate above up."""
    return lambda found: torch.cat([found[key] for key in _flat(names)])


def _joined_b(
    names: list[list[str]], size_out: int, rows: list[slice]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """(out, k·r·E): the B of every expert, block-diagonal over gate and up, experts side by side."""

    def join(found: Mapping[str, Tensor]) -> Tensor:
        experts = []
        for keys in names:
            r = found[keys[0]].shape[1]
            b = found[keys[0]].new_zeros(size_out, r * len(keys))
            for i, (key, own) in enumerate(zip(keys, rows, strict=True)):
                b[own, i * r : (i + 1) * r] = found[key]
            experts.append(b)
        return torch.stack(experts, dim=-1).flatten(1)

    return join
