"""Modules that lay the tokens of all rows of a batch in one axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from veneer.adapters import AdapterModule, walk
from veneer.layers.parameter import LoraParameter


def that_flatten(model: nn.Module) -> list[nn.Module]:
    """The modules that may lay the tokens of all rows in one axis, with adapters on what gets them.

    Mixtures do so before their router and their experts. They are recognised by a part named after experts,
    or by a bare parameter that is adapted.
    """
    places = dict(walk(model))
    adapted = [path.split(".") for path, module in places.items() if isinstance(module, AdapterModule)]
    found = {_holder(path.split("."), "expert") for path in places if "expert" in path}
    bare = [path for path in adapted if isinstance(places[".".join(path)], LoraParameter)]
    found |= {_holder(path) for path in bare if not any(path[: len(one)] == list(one) for one in found)}

    def concerned(holder: tuple[str, ...], path: Sequence[str]) -> bool:
        inside = path[len(holder) :]
        return path[: len(holder)] == list(holder) and not any("att" in part for part in inside)

    return [places[".".join(one)] for one in found if any(concerned(one, path) for path in adapted)]


def _holder(path: Sequence[str], word: str = "") -> tuple[str, ...]:
    """The path of the module that holds the first part with this word in its name, or else the last part."""
    while path[-1] == "base_layer":
        path = path[:-1]
    end = next(place for place, part in enumerate(path) if word in part) if word else len(path) - 1
    holder = tuple(path[:end])
    while holder[-1:] == ("base_layer",):
        holder = holder[:-1]
    return holder
