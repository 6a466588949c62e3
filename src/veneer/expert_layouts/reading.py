"""From the tensors of a file to the factors of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.config import LoraConfig
from veneer.expert_layouts.experts import Experts, Factors
from veneer.expert_layouts.layouts import STACKS, Form, Layout
from veneer.files.keys import PREFIX
from veneer.spec import LoraSpec, resolve_all
from veneer.wording import listed

#: The names of an expert's projections, and what each is called here.
PROJECTIONS = {name: names[0] for halves in STACKS.values() for names in halves for name in names}
_FORMS: dict[Form, str] = {
    "each": "tensors for every expert",
    "folded": "tensors of two axes for all experts",
    "stacked": "tensors with an axis of experts",
}
_HOLDER = r"(?P<holder>(?:.+\.)?experts)"
_ROLE = r"\.lora_(?P<role>[AB])\.weight"
_EACH = re.compile(rf"{_HOLDER}\.(?P<expert>\d{{1,6}})\.(?P<part>{'|'.join(PROJECTIONS)}){_ROLE}")
_STACKED = re.compile(rf"{_HOLDER}\.(?P<part>{'|'.join([*PROJECTIONS, *STACKS])}){_ROLE}")
_FOLDED = re.compile(rf"{_HOLDER}(?P<inner>(?:\.base_layer)*){_ROLE}")
_INSIDE = re.compile(rf"{_HOLDER}\.(?:\d+\.(?:{'|'.join(PROJECTIONS)})\.lora_|base_layer\.lora_|lora_)")


class Place(NamedTuple):
    """Where a tensor of a file belongs.

    Attributes:
        form: How the file cuts the factors.
        holder: The path of the module ``experts``, as in the file.
        part: The projection by its name in the file; of a folded stack ``base_layer``, or nothing.
        expert: The number of the expert, in the form ``each``.
        role: ``A`` or ``B``.
    """

    form: Form
    holder: str
    part: str
    expert: int
    role: str


@dataclass
class Found:
    """The factors of experts in a file, by name.

    Attributes:
        places: Name -> where it belongs.
        others: The names of all other tensors.
        strange: Names inside an ``experts`` that are no factors of it, such as magnitudes.
    """

    places: dict[str, Place] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)

    @property
    def forms(self) -> set[Form]:
        return {place.form for place in self.places.values()}


def find(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> Found:
    """Sort the tensors of a file by their names and shapes."""
    found = Found()
    for name, shape in shapes.items():
        place = _place(name, len(shape))
        if place is not None and (place.form != "folded" or _is_stack(place, shapes, config)):
            found.places[name] = place
        elif _INSIDE.match(name) and place is None:
            found.strange.append(name)
        else:
            found.others.append(name)
    return found


def _place(name: str, dimensions: int) -> Place | None:
    for form, pattern, wanted in (("each", _EACH, 2), ("stacked", _STACKED, 3), ("folded", _FOLDED, 2)):
        match = pattern.fullmatch(name)
        if match is not None and dimensions == wanted:
            parts = match.groupdict()
            part = parts.get("part") or (parts.get("inner") or "").lstrip(".")
            return Place(form, parts["holder"], part, int(parts.get("expert") or 0), parts["role"])  # type: ignore[arg-type]
    return None


def _is_stack(place: Place, shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> bool:
    """Whether a pair called ``experts`` is that of a stack, and not of something else of this name."""
    if config.target_parameters:
        return any(name.rpartition(".")[2] in STACKS for name in config.target_parameters)
    return f"{place.holder}.base_layer.lora_A.weight" in shapes


def parameter_of(place: Place, folded: Iterable[str], config: LoraConfig) -> str | None:
    """The stack that a folded pair belongs to: of two, that of ``down_proj`` lies around the other.

    Args:
        place: Of a factor.
        folded: The parts of all folded pairs of the same holder.
        config: The configuration, which tells what a lone pair is.
    """
    parts = set(folded)
    if parts == {"", "base_layer"}:
        return "gate_up_proj" if place.part == "base_layer" else "down_proj"
    if parts == {""}:
        named = {name.rpartition(".")[2] for name in config.target_parameters or ()} & STACKS.keys()
        return named.pop() if len(named) == 1 else None
    return None


def stacks(found: Found, config: LoraConfig) -> dict[str, str | None]:
    """Path of a folded pair, as in the file -> the stack that it belongs to; None where that is not known."""
    folded: dict[str, set[str]] = {}
    places = [place for place in found.places.values() if place.form == "folded"]
    for place in places:
        folded.setdefault(place.holder, set()).add(place.part)
    return {pair_of(place): parameter_of(place, folded[place.holder], config) for place in places}


def pair_of(place: Place) -> str:
    return f"{place.holder}.{place.part}" if place.part else place.holder


def read(
    layout: Layout, config: LoraConfig, tensors: Mapping[str, Tensor], found: Found
) -> tuple[Experts, list[str]]:
    """The factors of the experts in a file.

    Args:
        layout: That of the file.
        config: Its configuration.
        tensors: By name.
        found: What `find` made of the names.

    Returns:
        The factors, and everything that cannot be read, in words; nothing of the former counts then.
    """
    if found.forms and layout.form not in found.forms:
        theirs = " and ".join(_FORMS[form] for form in sorted(found.forms))
        return {}, [f"in the layout {layout.name} there are {_FORMS[layout.form]}; the file has {theirs}"]
    problems = [f"{name} is no factor of an expert, and has no place here" for name in found.strange]
    groups: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    folded = stacks(found, config)
    for name, place in found.places.items():
        part = place.part
        if place.form == "folded":
            stack = folded[pair_of(place)]
            if stack is None:
                problems.append(f"{name}: target_parameters does not say of which stack it is")
                continue
            part = stack
        groups.setdefault((place.holder, part), {})[place.expert, place.role] = name
    experts: dict[str, dict[str, Factors]] = {}
    specs = _specs(config, groups, found)
    for (holder, part), names in groups.items():
        form = next(iter({found.places[name].form for name in names.values()}))
        made = _factors(holder, part, names, tensors, specs, form, layout)
        if isinstance(made, str):
            problems.append(f"{holder}.{part}: {made}")
        else:
            experts.setdefault(holder, {})[PROJECTIONS.get(part, part)] = made
    for holder, parts in experts.items():
        counts = {name: factors.count for name, factors in parts.items()}
        if len(set(counts.values())) > 1:
            numbers = ", ".join(f"{count} of {name}" for name, count in counts.items())
            problems.append(f"{holder}: the numbers of experts differ ({numbers})")
    return experts, problems


def path_of(holder: str, part: str, expert: int | None = None) -> str:
    """The path that patterns of ranks and strengths are tried on."""
    middle = "" if expert is None else f"{expert}."
    return f"{holder.removeprefix(PREFIX)}.{middle}{part}"


def _specs(
    config: LoraConfig, groups: Mapping[tuple[str, str], Mapping[tuple[int, str], str]], found: Found
) -> dict[str, LoraSpec]:
    paths = {
        path_of(holder, part, expert if found.places[name].form == "each" else None): ""
        for (holder, part), names in groups.items()
        for (expert, _), name in names.items()
    }
    return resolve_all(config, "", paths)


def _factors(
    holder: str,
    part: str,
    names: Mapping[tuple[int, str], str],
    tensors: Mapping[str, Tensor],
    specs: Mapping[str, LoraSpec],
    form: Form,
    layout: Layout,
) -> Factors | str:
    """The factors of one projection, or what is wrong with them."""
    if form == "each":
        return _of_each(holder, part, names, tensors, specs)
    lacking = [f"lora_{role}" for role in "AB" if (0, role) not in names]
    if lacking:
        return f"{lacking[0]} is missing"
    a, b, spec = tensors[names[0, "A"]], tensors[names[0, "B"]], specs[path_of(holder, part)]
    if form == "folded":
        return _of_folded(a, b, spec, layout)
    if a.shape[1] != b.shape[2] or not (len(a) == len(b) or 1 in (len(a), len(b))):
        return f"factors of shapes {tuple(a.shape)} and {tuple(b.shape)} have no product"
    if len(a) == len(b) == 1:
        return "both factors are shared by all experts, so their number is not known"
    if a.shape[1] != spec.r:
        return f"its factors have rank {a.shape[1]}, the configuration says {spec.r}"
    return Factors(a, b, spec.scaling)


def _of_each(
    holder: str,
    part: str,
    names: Mapping[tuple[int, str], str],
    tensors: Mapping[str, Tensor],
    specs: Mapping[str, LoraSpec],
) -> Factors | str:
    count = 1 + max(expert for expert, _ in names)
    lacking = [f"{e} (lora_{role})" for e in range(count) for role in "AB" if (e, role) not in names]
    if lacking:
        return f"the factors of experts are missing: {listed(lacking)}"
    a, b = ([tensors[names[expert, role]] for expert in range(count)] for role in "AB")
    own = [specs[path_of(holder, part, expert)] for expert in range(count)]
    sizes = {(tuple(x.shape), tuple(y.shape)) for x, y in zip(a, b, strict=True)}
    if len({(spec.r, spec.scaling) for spec in own}) > 1 or len(sizes) > 1:
        return "ranks, strengths or sizes differ between experts"
    if a[0].shape[0] != b[0].shape[1]:
        return f"factors of shapes {tuple(a[0].shape)} and {tuple(b[0].shape)} have no product"
    if a[0].shape[0] != own[0].r:
        return f"its factors have rank {a[0].shape[0]}, the configuration says {own[0].r}"
    return Factors(torch.stack(a), torch.stack(b), own[0].scaling)


def _of_folded(a: Tensor, b: Tensor, spec: LoraSpec, layout: Layout) -> Factors | str:
    r = spec.r
    if a.shape[0] != b.shape[1] or a.shape[0] % r:
        return f"factors of shapes {tuple(a.shape)} and {tuple(b.shape)} are no stacks of rank {r}"
    return Factors(*unfolded(a, b, r, layout), spec.scaling)


def unfolded(a: Tensor, b: Tensor, r: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) of the folded factors (E·r, in) and (out, r·E)."""
    first = a.reshape(-1, r, a.shape[1])
    if layout.expert_slowest:
        second = b.reshape(b.shape[0], -1, r).permute(1, 0, 2)
    else:
        second = b.reshape(b.shape[0], r, -1).permute(2, 0, 1)
    return (second.transpose(-2, -1), first.transpose(-2, -1)) if layout.turned else (first, second)


def folded(a: Tensor, b: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The inverse of `unfolded`."""
    first, second = (b.transpose(-2, -1), a.transpose(-2, -1)) if layout.turned else (a, b)
    order = (1, 0, 2) if layout.expert_slowest else (1, 2, 0)
    return first.flatten(0, 1), second.permute(*order).flatten(1)
