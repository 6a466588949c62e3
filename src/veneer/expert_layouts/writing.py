"""From the factors of experts to the tensors of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from veneer.errors import Hint, Text
from veneer.expert_layouts.experts import Experts, Factors, joined, only, parted, without_halves
from veneer.expert_layouts.layouts import STACKS, Layout
from veneer.expert_layouts.mixture import Mixture
from veneer.expert_layouts.reading import folded, path_of

_NUMBERED = {names[0]: names[1] for halves in STACKS.values() for names in halves}
#: What the module around the experts is called in transformers 4, where projections are numbered, and today.
_BLOCKS = (".block_sparse_moe.", ".mlp.")


@dataclass
class Written:
    """The factors of experts in a layout.

    Attributes:
        tensors: By name.
        ranks: Path of a module or parameter -> its rank and its strength s.
        modules: Names for ``target_modules``.
        parameters: Names for ``target_parameters``.
        problems: What the layout cannot say, in words; nothing else counts then.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    problems: list[str | Text] = field(default_factory=list)


def write(layout: Layout, experts: Experts, mixture: Mixture) -> Written:
    """Bring the factors of experts into a layout.

    Args:
        layout: To write.
        experts: The factors.
        mixture: What is known of the base model.
    """
    made = Written()
    for holder, parts in experts.items():
        if problem := _halves(holder, parts, layout, mixture):
            made.problems.append(problem)
            continue
        brought = _brought(parts, layout, mixture)
        made.problems += [f"{holder}: {line}" for line in _unsaid(brought, layout)]
        path = renamed(holder, layout, mixture)
        for part, factors in brought.items():
            _WRITERS[layout.form](made, path, _called(part, path, layout), factors, layout, mixture)
    if layout.form == "folded":
        _nested(made, layout)
    return made


def renamed(name: str, layout: Layout, mixture: Mixture) -> str:
    """A name with the block around the experts called as in the layout; transformers 5 calls it ``mlp``."""
    old, new = _BLOCKS if layout.form == "folded" else _BLOCKS[::-1]
    if layout.form == "folded" or (mixture.numbered and layout.form == "each"):
        return name.replace(old, new)
    return name


def _halves(holder: str, parts: Mapping[str, Factors], layout: Layout, mixture: Mixture) -> str | Text | None:
    """Why gate and up cannot be brought together, or taken apart."""
    lone = without_halves(parts)
    if lone and (layout.form == "folded" or layout.one_a):
        return f"{holder}: {lone} without its other half, and this layout joins the two"
    if layout.by_storage and not mixture.known:
        return Text(
            f"{holder}: which of its factors {layout.name} calls A depends on the base model, which the "
            "adapter does not name: give it with ",
            Hint("base"),
        )
    apart = "gate_up_proj" in parts
    both = {"gate_proj", "up_proj"} <= parts.keys()
    if not mixture.known and ((apart and layout.form != "folded") or (both and layout.form == "folded")):
        return Text(
            f"{holder}: whether gate and up alternate in gate_up_proj, as in gpt-oss, depends on the base "
            "model, which the adapter does not name: give it with ",
            Hint("base"),
        )
    if apart and layout.form != "folded" and parts["gate_up_proj"].b.shape[1] % 2:
        return f"{holder}: gate_up_proj has an odd number of rows, {parts['gate_up_proj'].b.shape[1]}"
    return None


def _brought(parts: Mapping[str, Factors], layout: Layout, mixture: Mixture) -> dict[str, Factors]:
    """Gate and up joined or parted, and factors shared or expanded, as the layout has them."""
    made = dict(parts)
    if {"gate_proj", "up_proj"} <= made.keys() and (layout.form == "folded" or layout.one_a):
        made["gate_up_proj"] = joined(made.pop("gate_proj"), made.pop("up_proj"), mixture.interleaved)
    if "gate_up_proj" in made and layout.form != "folded":
        both = made.pop("gate_up_proj")
        made["gate_proj"], made["up_proj"] = parted(both, mixture.interleaved, layout.one_a)
    if layout.shared == "none":
        return {part: factors.expanded() for part, factors in made.items()}
    return (
        {part: _shared(part, factors) for part, factors in made.items()} if layout.shared == "outer" else made
    )


def _shared(part: str, factors: Factors) -> Factors:
    """With the outer factor once, where it is the same for all experts: A of gate and up, B of down."""
    whole = factors.expanded()
    if part == "down_proj":
        return replace(whole, b=factors.b if (b := only(factors.b)) is None else b)
    return replace(whole, a=factors.a if (a := only(factors.a)) is None else a)


def _unsaid(parts: Mapping[str, Factors], layout: Layout) -> Iterator[str]:
    """What the layout has no place for."""
    wanted = STACKS.keys() if layout.form == "folded" else ("gate_proj", "up_proj", "down_proj")
    lacking = [part for part in wanted if part not in parts]
    if layout.whole and lacking:
        yield f"{', '.join(lacking)} has no update, and {layout.program} needs one for every projection"
    if layout.shared != "outer":
        return
    for part, factors in parts.items():
        role, outer = ("B", factors.b) if part == "down_proj" else ("A", factors.a)
        if len(outer) > 1:
            yield f"{part} has another lora_{role} for every expert, and this layout has one for all"


def _called(part: str, holder: str, layout: Layout) -> str:
    numbered = layout.numbered
    if numbered is None:
        numbered = _BLOCKS[0] in f"{holder}."
    return _NUMBERED.get(part, part) if numbered else part


def _each(made: Written, holder: str, part: str, factors: Factors, layout: Layout, mixture: Mixture) -> None:
    for expert, (a, b) in enumerate(zip(factors.a, factors.b, strict=True)):
        _put(made, f"{holder}.{expert}.{part}", a, b)
        made.ranks[path_of(holder, part, expert)] = factors.r, factors.scaling
    made.modules.add(part)


def _stacked(
    made: Written, holder: str, part: str, factors: Factors, layout: Layout, mixture: Mixture
) -> None:
    _put(made, f"{holder}.{part}", factors.a, factors.b)
    made.ranks[path_of(holder, part)] = factors.r, factors.scaling
    made.modules.add(part)


def _folded(
    made: Written, holder: str, part: str, factors: Factors, layout: Layout, mixture: Mixture
) -> None:
    _put(made, f"{holder}.{part}", *folded(factors.a, factors.b, layout.over(mixture.transposed)))
    made.ranks[path_of(holder, part)] = factors.r, factors.scaling
    made.parameters.add(path_of(holder, part))


_WRITERS = {"each": _each, "stacked": _stacked, "folded": _folded}


def _put(made: Written, name: str, a: Tensor, b: Tensor) -> None:
    made.tensors[f"{name}.lora_A.weight"], made.tensors[f"{name}.lora_B.weight"] = a, b


def _nested(made: Written, layout: Layout) -> None:
    """Name the stacks as PEFT does, which wraps one parameter of a module inside the other."""
    names = {name.rpartition(".lora_")[0] for name in made.tensors}
    table = {}
    for name in names:
        holder, _, stack = name.rpartition(".")
        inner = stack == "gate_up_proj" and f"{holder}.down_proj" in names
        table[name] = f"{holder}.base_layer" if inner else holder
    made.tensors = {
        f"{table[name.rpartition('.lora_')[0]]}.lora_{name.rpartition('.lora_')[2]}": tensor
        for name, tensor in made.tensors.items()
    }
