"""Whether several adapters can be measured together: on one base, on the same tokens, for one task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError, ConfigError, Hint, Text
from ..hub import is_local
from ..wording import bullets
from .saved_adapter import SavedAdapter, base_name

#: What a tokenizer and its chat template are saved as.
_TOKENIZER = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.*")


def check_comparable(adapters: Sequence[SavedAdapter], model: str | None, quantize: str) -> None:
    """Refuse adapters that cannot be measured in one batch, as far as their files tell.

    Args:
        adapters: What is to be measured.
        model: The base that was asked for instead of theirs.
        quantize: Storage of the base; ``auto`` is that of each adapter's training.

    Raises:
        ConfigError: Some differ in what they must share; lists everything.
    """
    wrong: list[str | Text] = []
    same = _grouped(adapters, lambda saved: str(saved.directory.resolve()))
    wrong += [f"{', '.join(n)} are the same directory: name it once" for n in same.values() if len(n) > 1]
    if model is None and len(bases := _grouped(adapters, _base)) > 1:
        told = f"their bases differ ({_said(bases)}): measure those of one base, or pass "
        wrong.append(Text(told, Hint("model")))
    if len(tasks := _grouped(adapters, _classes)) > 1:
        wrong.append(f"their tasks differ ({_said(tasks)})")
    if quantize == "auto" and len(stored := _grouped(adapters, _quantisation)) > 1:
        told = f"they were trained over bases that were stored differently ({_said(stored)}): pass "
        wrong.append(Text(told, Hint("quantize")))
    if biased := [saved.name for saved in adapters if saved.config.bias != "none"]:
        wrong.append(f"{', '.join(biased)}: trains biases of the base, which all rows of a batch share")
    if wrong:
        raise ConfigError(bullets("these adapters cannot be measured together:", wrong))


def _base(saved: SavedAdapter) -> str:
    named = base_name(saved)
    return str(Path(named).expanduser().resolve()) if is_local(named) else named


def _classes(saved: SavedAdapter) -> str:
    names = saved.classes()
    return "language model" if names is None else f"classes {', '.join(names)}"


def _quantisation(saved: SavedAdapter) -> str:
    options = saved.noted("options")
    return str((options.get("quantize") if isinstance(options, dict) else None) or "as saved")


def _grouped(adapters: Iterable[SavedAdapter], of: Callable[[SavedAdapter], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for saved in adapters:
        found.setdefault(of(saved), []).append(saved.name)
    return found


def _said(groups: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {what}" for what, names in groups.items())


def check_same_tokens(adapters: Sequence[SavedAdapter], rows: Callable[[SavedAdapter], Any]) -> None:
    """Refuse adapters whose own tokenizers make other tokens of the data than the first one's.

    Args:
        adapters: What is to be measured.
        rows: Lays the data out as an adapter's tokenizer does; asked only where the files differ.

    Raises:
        AdapterFileError: Some do; names all of them.
    """
    first, *others = adapters
    files = _tokenizer_files(first)
    suspects = [saved for saved in others if _tokenizer_files(saved) != files]
    if suspects:
        expected = rows(first)
        differing = [saved.name for saved in suspects if rows(saved) != expected]
        if differing:
            raise AdapterFileError(
                f"the tokenizer or chat template beside {', '.join(differing)} lays the data out in another "
                f"way than that of {first.name}: measure them by themselves"
            )


def _tokenizer_files(saved: SavedAdapter) -> dict[str, bytes]:
    found = {file for pattern in _TOKENIZER for file in saved.directory.glob(pattern) if file.is_file()}
    return {file.name: file.read_bytes() for file in found}
