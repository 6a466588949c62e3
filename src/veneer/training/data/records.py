"""Records of one form, with the place of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from .forms import Form
from .recognition import near_columns


class Records(list[dict[str, Any]]):
    """Records of one form, with the place of each.

    Attributes:
        source: What the user named.
        form: Their form.
        label_names: Names of the classes, if the source has them.
    """

    def __init__(
        self,
        records: Iterable[dict[str, Any]],
        *,
        source: str,
        form: Form,
        places: Sequence[str] | None = None,
        label_names: list[str] | None = None,
    ) -> None:
        super().__init__(records)
        self.source, self.form, self.label_names = source, form, label_names
        self._places = places

    def where(self, index: SupportsIndex) -> str:
        """The place of a record, such as ``line 7``."""
        number = int(index)
        return self._places[number] if self._places is not None else f"record {number + 1}"

    def first(self, number: int) -> Records:
        """The first few of them."""
        return Records(
            self[:number],
            source=self.source,
            form=self.form,
            places=self._places,
            label_names=self.label_names,
        )

    def line(self) -> str:
        """A line for the user: number, source and form of the records, and unused columns."""
        used = {*self.form.columns, *self.form.more}
        unused = sorted({str(name) for record in self for name in record} - used)
        line = f"{len(self)} {'record' if len(self) == 1 else 'records'} from {self.source}: {self.form}"
        if unused:
            line += f"; not used: {', '.join(unused[:6])}{', …' if len(unused) > 6 else ''}"
        near = near_columns(dict.fromkeys(unused), self.form.more)
        return line + (f" ({'; '.join(near)})" if near else "")
