"""Adapters of experts that were modules of their own, for models that hold them as stacks."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer import layers, targets
from veneer.config import LoraConfig
from veneer.errors import Hint, LoadMismatchError
from veneer.files.keys import PREFIX
from veneer.spec import LoraSpec, resolve_all
from veneer.wording import warn

#: Names of an expert's projections, and the half of which stack each became.
_PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", 0)),
}
_EXPERT = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(_PARTS)})\.lora_([AB])\.weight")
_FACTOR = re.compile(r"(.*)\.lora_([AB])\.weight")


@dataclass
class Stacked:
    """An adapter's file under the names of today.

    Attributes:
        config: The configuration, with the stacks among ``target_parameters``.
        shapes: Shapes by new name.
        sources: For each new name the old ones, and how the tensor comes of theirs.
    """

    config: LoraConfig
    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, tuple[list[str], Callable[[Mapping[str, Tensor]], Tensor]]] = field(repr=False)

    def tensors(
        self, names: Iterable[str], read: Callable[[Iterable[str]], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors of new names, of old ones."""
        sources = {name: self.sources[name] for name in names}
        held = read(dict.fromkeys(old for olds, _ in sources.values() for old in olds))
        return {name: make(held) for name, (_, make) in sources.items()}


def stacked(model: nn.Module, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> Stacked | None:
    """Read an adapter of single experts as one of their stacks; None where it is not that.

    Transformers 5 holds the experts of a layer in two parameters, ``gate_up_proj`` and ``down_proj``, where
    version 4 had a linear for each matrix of each expert. An expert's update stays what it was: gate and up,
    of rank r each, become one of rank 2r whose B is block-diagonal, and of the same strength.

    Raises:
        LoadMismatchError: If an expert is missing, or ranks differ between experts.
    """
    old = {m[1]: [] for key in shapes if (m := _EXPERT.fullmatch(key))}  # type: dict[str, list[str]]
    for key in shapes:
        if match := _EXPERT.fullmatch(key):
            old[match[1]].append(key)
    places = {place: where for place in old if (where := _stack(model, place)) is not None}
    if not places:
        return None
    own = copy.deepcopy(config)
    result = Stacked(own, {}, {})
    own.rank_pattern, own.alpha_pattern = dict(own.rank_pattern), dict(own.alpha_pattern)
    parameters: set[str] = set(own.target_parameters or ())
    first = [k for place in places for k in old[place] if (m := _EXPERT.fullmatch(k)) and int(m[2]) == 0]
    specs = resolve_all(config, "", {_module_of(key): "" for key in first})
    for place, where in places.items():
        parameters.update(_stack_one(result, specs, model, where, old[place], shapes))
    taken = {key for place in places for key in old[place]}
    modules = set()
    for key, shape in shapes.items():
        if key in taken:
            continue
        new = next((where + key[len(p) :] for p, where in _beside(places).items() if key.startswith(p)), key)
        result.shapes[new] = shape
        result.sources[new] = ([key], lambda held, key=key: held[key])  # type: ignore[misc]
        if match := _FACTOR.fullmatch(new.removeprefix(PREFIX)):
            module = model.get_submodule(match[1])
            if layers.find(module) is None and isinstance(getattr(module, "weight", None), nn.Parameter):
                parameters.add(f"{match[1]}.weight")
            else:
                modules.add(match[1])
    others = {path for path, _ in model.named_modules()} - modules
    own.target_modules = targets.portable_targets(modules, others) if modules else []
    own.exclude_modules = own.layers_to_transform = own.layers_pattern = None
    own.target_parameters = sorted(parameters)
    if own.lora_dropout:
        warn(
            Hint("lora_dropout", own.lora_dropout),
            " is set to 0: the experts are bare parameters here, on which dropout is not defined",
        )
        own.lora_dropout = 0.0
    return result


def _module_of(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".lora_")[0]


def _stack(model: nn.Module, place: str) -> str | None:
    """Where the model holds the stacks of the experts of an old path; None if it does not."""
    for old, new in (("", ""), (".block_sparse_moe.", ".mlp.")):
        path = place.replace(old, new) if old else place
        try:
            module = model.get_submodule(path.removeprefix(PREFIX))
        except AttributeError:
            continue
        if {"gate_up_proj", "down_proj"} <= set(module._parameters):
            return path
    return None


def _beside(places: Mapping[str, str]) -> dict[str, str]:
    """The modules around the experts, which may have been renamed with them."""
    cut = len("experts")
    return {old[:-cut]: new[:-cut] for old, new in places.items()}


def _stack_one(
    result: Stacked,
    specs: Mapping[str, LoraSpec],
    model: nn.Module,
    where: str,
    keys: list[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Add the tensors of one layer's stacks; the paths of the parameters that they belong to."""
    path = where.removeprefix(PREFIX)
    module = model.get_submodule(path)
    held: dict[tuple[str, int, int, str], str] = {}
    for key in keys:
        match = _EXPERT.fullmatch(key)
        assert match is not None
        stack, half = _PARTS[match[3]]
        held[stack, half, int(match[2]), match[4]] = key
    present = [s for s in ("gate_up_proj", "down_proj") if any(k[0] == s for k in held)]
    both = len(present) == 2
    for stack in present:
        count, size_out = module._parameters[stack].shape[:2]  # type: ignore[union-attr]
        halves = sorted({h for s, h, _, _ in held if s == stack})
        wanted = [(stack, h, e, f) for h in halves for e in range(count) for f in "AB"]
        if absent := [k for k in wanted if k not in held]:
            raise LoadMismatchError(
                f"{where}: {len(absent)} of the {len(wanted)} factors of its experts are missing, such as "
                f"those of expert {absent[0][2]}; a stack takes an update for every expert"
            )
        ranks = {shapes[held[k]][0] for k in wanted if k[3] == "A"}
        if len(ranks) > 1:
            raise LoadMismatchError(f"{where}: ranks differ between experts ({sorted(ranks)})")
        r = ranks.pop()
        outer = where + (".base_layer" if both and stack == "gate_up_proj" else "")
        parts = size_out // (2 if stack == "gate_up_proj" else 1)
        names = {f: [[held[stack, h, e, f] for h in halves] for e in range(count)] for f in "AB"}
        size_in = shapes[names["A"][0][0]][1]
        whole = r * len(halves)
        result.shapes[f"{outer}.lora_A.weight"] = (whole * count, size_in)
        result.shapes[f"{outer}.lora_B.weight"] = (size_out, whole * count)
        flat = {f: [key for expert in names[f] for key in expert] for f in "AB"}
        result.sources[f"{outer}.lora_A.weight"] = (flat["A"], _joined_a(names["A"]))
        offsets = [h * parts for h in halves]
        result.sources[f"{outer}.lora_B.weight"] = (flat["B"], _joined_b(names["B"], size_out, offsets))
        spec = specs[_module_of(names["A"][0][0])]
        strength = spec.scaling
        root = math.sqrt(whole) if spec.use_rslora else whole
        result.config.rank_pattern[f"^{path}.{stack}$"] = whole
        result.config.alpha_pattern[f"^{path}.{stack}$"] = strength * root
    return [f"{path}.{stack}" for stack in present]


def _joined_a(names: list[list[str]]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """(E·k·r, in): the A of every expert, gate above up."""
    return lambda held: torch.cat([held[key] for expert in names for key in expert])


def _joined_b(
    names: list[list[str]], size_out: int, offsets: list[int]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """(out, k·r·E): the B of every expert, block-diagonal over gate and up, experts side by side."""

    def join(held: Mapping[str, Tensor]) -> Tensor:
        experts = []
        for keys in names:
            r = held[keys[0]].shape[1]
            b = held[keys[0]].new_zeros(size_out, r * len(keys))
            for i, (key, offset) in enumerate(zip(keys, offsets, strict=True)):
                part = held[key]
                b[offset : offset + len(part), i * r : (i + 1) * r] = part
            experts.append(b)
        return torch.stack(experts, dim=-1).flatten(1)

    return join
