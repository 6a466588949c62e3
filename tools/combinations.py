"""What combines with what, asked of the code: layer, initialisation, variant and storage of the base."""

from __future__ import annotations

from collections.abc import Sequence


class _Notes:
    """Reasons, numbered as they come; the names of the row in them are left out."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def cell(self, reason: str | None, names: Sequence[str]) -> str:
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _gathered(cells: dict[tuple[str, str], tuple[str, ...]]) -> list[tuple[str, Sequence[str]]]:
    """Rows by layer and storage, those with the same cells in one: by layer first, then by storage."""
    by_layer: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (layer, storage), row in cells.items():
        by_layer.setdefault((layer, row), []).append(f"`{storage}`")
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for (layer, row), storages in by_layer.items():
        alike.setdefault((tuple(storages), row), []).append(layer)
    return [(f"{_listed(ls)} in {_listed(storages)}", row) for (storages, row), ls in alike.items()]


def tables() -> dict[str, str]:
    """The parts of the page: ``combinations``, ``absent``, ``reasons``, ``served`` and ``total``."""
    from tests.laws import cases, product

    notes, sections = _Notes(), []
    pairs = product.pairs()
    existing = [choice for choice in product.product() if pairs[choice.layer, choice.storage]]
    reasons = {choice: product.refusal(choice) for choice in existing}
    inits, variants = list(cases.INITS), list(cases.VARIANTS)  # registries are in the order of imports
    for variant in variants:
        rows = {}
        for (layer, storage), exists in pairs.items():
            if not exists:
                continue
            names = product.names_in_reasons(layer, storage)
            row = [notes.cell(reasons[product.Choice(layer, i, variant, storage)], names) for i in inits]
            served = "yes" in row
            merging = product.refuses_merge(layer, variant, storage) if served else None
            rows[product.title(layer), storage] = (*row, notes.cell(merging, names) if served else "")
        sections.append(f"`{variant}`:\n\n{_table([*inits, 'merge'], _gathered(rows))}")
    absent: dict[str, list[str]] = {}
    for (layer, storage), exists in pairs.items():
        if not exists:
            absent.setdefault(storage, []).append(product.title(layer))
    alike: dict[tuple[str, ...], list[str]] = {}
    for storage, titles in absent.items():
        alike.setdefault(tuple(titles), []).append(f"`{storage}`")
    return {
        "combinations": "\n\n".join(sections),
        "absent": "\n".join(f"- {_listed(storages)}: no {', '.join(t)}" for t, storages in alike.items()),
        "reasons": str(notes),
        "served": str(sum(reason is None for reason in reasons.values())),
        "total": str(len(reasons)),
        "product": str(sum(1 for _ in product.product())),
    }
