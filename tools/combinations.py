"""What combines with what, asked of the code: layer, initialisation, variant and storage of the base."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

_PLAIN = ("Default", "plain", "dense")


class Combinations:
    """Every combination of the four, and why it is refused, if it is.

    The layers are the plain case of each that the laws try, `nn.MultiheadAttention` and bare parameters.
    """

    def __init__(self) -> None:
        from torch import nn

        from tests.laws import cases
        from veneer.backends.base import backends
        from veneer.layers import find, registry
        from veneer.layers.parameter import LoraParameter

        self.options = {"init": cases.INITS, "variant": cases.VARIANTS}
        self.storages = [backend.name for backend in backends()]
        self.coded = [name for name in self.storages if name in cases.CODED]
        self.make: dict[str, Callable[[str], Any]] = {}
        for type_name, _ in registry.items():
            if type_name in cases.LAYERS:
                first = cases.LAYERS[type_name][0]

                def make(storage: str, case: Any = first) -> Any:
                    base = cases.BACKENDS[storage](case.base())
                    kind = find(base)
                    return None if kind is None else kind(base)

                self.make[f"`{type_name.rpartition('.')[2]}`"] = make

        class Stack(nn.Module):
            def __init__(self, *shape: int) -> None:
                super().__init__()
                self.stack = nn.Parameter(nn.init.normal_(nn.Linear(1, 1).weight.new_empty(shape)))

        def attention(storage: str) -> Any:
            base = cases.BACKENDS[storage](nn.MultiheadAttention(8, 2))
            return find(base)(base)  # type: ignore[misc]

        self.make["`MultiheadAttention`"] = attention
        for title, shape in (("a matrix", (8, 6)), ("a stack of matrices", (3, 8, 6))):
            self.make[title] = lambda storage, shape=shape: LoraParameter(
                cases.BACKENDS[storage](Stack(*shape)), "stack"
            )
        self.refusal = cache(self._refusal)
        self.layer = cache(lambda name, storage: self.make[name](storage))

    def _refusal(self, layer: str, init: str, variant: str, storage: str) -> str | None:
        from veneer import LoraConfig
        from veneer.errors import ConfigError
        from veneer.layers.making import why_not
        from veneer.spec import resolve

        options = {**self.options["init"][init], **self.options["variant"][variant]}
        try:
            return why_not(
                self.layer(layer, storage), resolve(LoraConfig(r=4, lora_alpha=6, **options), "default", "")
            )
        except ConfigError as error:
            return str(error)

    def merging(self, storage: str) -> str | None:
        """What merging into a linear of that storage does, where it is refused."""
        layer = self.layer("`Linear`", storage)
        return layer.backend.refuses_merge(layer.base_layer)  # type: ignore[no-any-return]

    def names(self, layer: str, storage: str) -> list[str]:
        """What a reason may call the layer and its storage."""
        made = self.layer(layer, storage)
        kind = str(made.backend.quantization)
        return [f"a {type(made.base_layer).__name__}", type(made.base_layer).__name__, kind, kind.upper()]

    def has(self, layer: str, storage: str) -> bool:
        """Whether there is such a layer in that storage: codes are those of linears."""
        return storage not in self.coded or layer == "`Linear`"

    def count(self) -> tuple[int, int]:
        """How many combinations of all four are served, and how many there are.

        Raises:
            SystemExit: If one is refused, and no pair in it is, or the other way round.
        """
        init, variant, storage = _PLAIN
        served = total = 0
        for what in itertools.product(self.make, *self.options.values(), self.storages):
            layer, i, v, s = what
            if not self.has(layer, s):
                continue
            pairs = [
                self.refusal(layer, i, variant, storage),
                self.refusal(layer, init, v, storage),
                self.refusal(layer, init, variant, s),
                self.refusal("`Linear`", i, variant, s),
                self.refusal("`Linear`", init, v, s),
                self.refusal("`Linear`", i, v, storage),
            ]
            refused = self.refusal(*what) is not None
            if refused is not any(pairs):
                raise SystemExit(
                    f"{what} is {'refused' if refused else 'served'}, against its pairs: {pairs}"
                )
            served, total = served + (not refused), total + 1
        return served, total


class _Notes:
    """Reasons, numbered as they come; the names of the row in them are left out."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def cell(self, reason: str | None, *names: str) -> str:
        if reason is None:
            return "yes"
        for name in names:
            reason = reason.replace(name, "…")
        return f"no {self.numbers.setdefault(reason, len(self.numbers) + 1)}"

    def __str__(self) -> str:
        return "\n".join(f"{number}. {reason}" for reason, number in self.numbers.items())


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows)])


def tables() -> dict[str, str]:
    """The parts of the page: ``layers``, ``storages``, ``pairs``, ``reasons``, ``served`` and ``total``."""
    all_ = Combinations()
    notes, (inits, variants) = _Notes(), all_.options.values()
    init, variant, storage = _PLAIN
    both = [*((i, variant) for i in inits), *((init, v) for v in variants if v != variant)]
    names = [*inits, *(v for v in variants if v != variant)]
    layers = [
        (
            layer,
            [notes.cell(all_.refusal(layer, i, v, storage), *all_.names(layer, storage)) for i, v in both],
        )
        for layer in all_.make
    ]
    storages = [
        (
            f"`{s}`",
            [
                *(notes.cell(all_.refusal("`Linear`", i, v, s), *all_.names("`Linear`", s)) for i, v in both),
                notes.cell(all_.merging(s), *all_.names("`Linear`", s)),
            ],
        )
        for s in all_.storages
    ]
    pairs = [(v, [notes.cell(all_.refusal("`Linear`", i, v, storage)) for i in inits]) for v in variants]
    served, total = all_.count()
    return {
        "layers": _table(names, layers),
        "storages": _table([*names, "merge"], storages),
        "pairs": _table(list(inits), pairs),
        "reasons": str(notes),
        "served": str(served),
        "total": str(total),
    }
