"""Which tensors of a file fit a model, and the report of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.errors import Hint, LoadMismatchError
from veneer.wording import some

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a file fit a model. All keys are names on disk.

    Attributes:
        renamed: for every usable tensor, its key in the file -> the key that the model expects.
        missing: expected keys that the file does not fill.
        unexpected: keys of the file that nothing expects.
        mismatched: ``(expected key, expected shape, found shape)``.
        prefix: ``(old, new)`` when all keys were re-mapped by one prefix, else None.
        remarks: other re-mappings that were made, in words.
        ambiguous: prefix re-mappings that were equally possible; none of them was made.
        causes: why file and model do not fit, in words, the most telling first.
    """

    renamed: dict[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    prefix: tuple[str, str] | None = None
    remarks: tuple[str, ...] = ()
    ambiguous: tuple[tuple[str, str], ...] = ()
    causes: tuple[str, ...] = ()
    found: int = 0
    expected: int = 0

    @property
    def ok(self) -> bool:
        """Every tensor of the file is used, and every expected one is there."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def missing_keys(self) -> list[str]:
        """``missing``, by the name that PEFT's and torch's results have."""
        return list(self.missing)

    @property
    def unexpected_keys(self) -> list[str]:
        """``unexpected``, by the name that PEFT's and torch's results have."""
        return list(self.unexpected)

    @property
    def notice(self) -> str | None:
        """What was re-mapped, as a sentence for the user; None when all keys were as expected."""
        lines = list(self.remarks)
        if self.prefix:
            old, new = self.prefix
            if not old:
                lines.append(f"{new!r} was put before the file's keys")
            elif not new:
                lines.append(f"{old!r} was taken from the front of the file's keys")
            else:
                lines.append(f"{old!r} at the front of the file's keys was read as {new!r}")
        return "; ".join(lines) if lines else None

    def message(self, where: object) -> str:
        """One text about everything: counts, up to three examples of each kind, likely causes, way out."""
        return f"{self._text(where)}."

    def _text(self, where: object) -> str:
        lines = [
            f"the adapter in {where} and this model do not fit: {self.found} tensors in the file, "
            f"{self.expected} expected by the model, {len(self.renamed)} usable"
        ]
        lines += _listing("in the file, but nothing in the model takes them", self.unexpected)
        lines += _listing("expected by the model, but not in the file", self.missing)
        shapes = [
            f"{k}: {found} in the file, {expected} in the model" for k, expected, found in self.mismatched
        ]
        lines += _listing("of another shape", shapes)
        if self.notice:
            lines.append(f"  re-mapped: {self.notice}")
        lines += [f"Likely cause: {cause}" for cause in self.causes]
        lines.append("Way out: load it on the model that it was made for")
        return "\n".join(lines)

    def raise_for(self, where: object) -> None:
        """Raise unless everything fits.

        Raises:
            LoadMismatchError: with `message`.
        """
        if not self.ok:
            hint = Hint("strict", False, "; {} loads what fits")
            raise LoadMismatchError(self._text(where), hint, ".")


def _listing(what: str, items: Sequence[str]) -> list[str]:
    return [f"  {len(items)} {what}:", *(f"      {item}" for item in some(items, 3))] if items else []
