"""A terminal on which a text is only a text."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..wording import visible


class PlainConsole(Console):
    """Shows every string as it is, in tables too: no markup, no emoji codes, nothing to obey."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render_str(self, text: str, *, style: str | Style = "", **options: Any) -> Text:
        """The string on one line, whatever is in it."""
        layout: dict[str, Any] = {name: options.get(name) for name in ("justify", "overflow")}
        return Text(visible(text), style=style, **layout)


def paragraphs(text: str) -> Text:
    """A text that keeps its line breaks, for a title or a cell."""
    return Text(visible(text, lines=True))
