"""Every error that Veneer raises on purpose.

Each is also the built-in exception that callers of PEFT already catch::

    VeneerError
    ├── ConfigError          ValueError    a configuration that cannot be right
    │   └── UnknownOptionError  TypeError  an option that does not exist
    ├── TargetError          ValueError    nothing matched, or what matched cannot be adapted
    ├── AdapterNameError     ValueError    an adapter name that is unknown, taken or unusable
    ├── CheckpointError      ValueError    files and tensors of an adapter
    │   ├── AdapterFileError               missing, truncated, hostile or unreadable file
    │   ├── LoadMismatchError RuntimeError tensors that do not fit the model
    │   └── BaseMismatchError              the adapter was made on another base model
    ├── RoutingError         ValueError    rows of a batch that cannot go through their adapters
    ├── MergeError           ValueError    a merge that would be wrong
    ├── CombineError         ValueError    adapters that cannot be combined
    ├── ExportError          ValueError    an adapter that another format cannot express, or the reverse
    ├── DataError            ValueError    training or evaluation data that cannot be used
    ├── TrainingError        RuntimeError  a training run that cannot go on
    └── MissingExtraError    ImportError   an optional library that is not installed

    VeneerWarning            UserWarning   something the user should know; nothing was refused

A message is text and `Hint`s. ``str(error)`` writes an option as Python does, ``untie=True``; the
command line writes the same hint as its flag, ``--untie``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn


class Blank(str):
    """A placeholder for a value, as N in ``rank=N``."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Hint:
    """An option in a message: ``Hint("r")``, ``Hint("untie", True)``.

    Args:
        option: Its name in Python.
        value: The value to show; without one only the name is shown.
        clause: Text around the option, with {} in its place. An interface without that option leaves the
            whole clause out; a hint without a clause is then shown as in Python.
    """

    option: str
    value: object = ...
    clause: str | None = None

    def __str__(self) -> str:
        return self.option if self.value is ... else f"{self.option}={self.value!r}"

    def __format__(self, spec: str) -> NoReturn:
        raise TypeError(
            "a Hint in an f-string would become plain text: pass it to the error or Text as a part"
        )


@dataclass(frozen=True, init=False)
class Text:
    """Text and `Hint`s; how an option is written is decided when the text is shown."""

    parts: tuple[str | Hint, ...]

    def __init__(self, *parts: str | Hint | Text) -> None:
        flat = (part.parts if isinstance(part, Text) else (part,) for part in parts)
        object.__setattr__(self, "parts", tuple(part for inner in flat for part in inner))

    @classmethod
    def join(cls, separator: str, messages: Iterable[str | Hint | Text]) -> Text:
        parts = [part for message in messages for part in (separator, message)]
        return cls(*parts[1:])

    def written(self, option: Callable[[Hint], str | None]) -> str:
        """The text.

        Args:
            option: Writes a hint's option; None if the reader's interface does not have it.
        """
        return "".join(
            part if isinstance(part, str) else _in_clause(part, option(part)) for part in self.parts
        )

    def __str__(self) -> str:
        return self.written(str)

    def __format__(self, spec: str) -> NoReturn:
        raise TypeError("a Text in an f-string would lose its hints: make it a part of another Text")


def show(value: object) -> str:
    """The repr of a value for a message, cut to 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits has no repr
        text = f"a {type(value).__name__}"
    return short(text, 80)


def short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _in_clause(hint: Hint, written: str | None) -> str:
    if hint.clause is None:
        return str(hint) if written is None else written
    return "" if written is None else hint.clause.replace("{}", written)


class VeneerError(Exception):
    """Base of every error raised on purpose.

    Args:
        parts: The message: texts, `Hint`s and `Text`s, one after another.

    Attributes:
        message: The same, for an interface that writes options in its own way.
    """

    def __init__(self, *parts: str | Hint | Text) -> None:
        self.message = Text(*parts)
        super().__init__(str(self.message))


class ConfigError(VeneerError, ValueError):
    """A configuration that cannot be right; the message lists all its problems."""


class UnknownOptionError(ConfigError, TypeError):
    """An option that does not exist; the message names the nearest one that does."""


class TargetError(VeneerError, ValueError):
    """No module matched, or a matched module cannot be adapted."""


class AdapterNameError(VeneerError, ValueError):
    """An adapter name that is unknown, already taken, or unusable as a module name."""


class CheckpointError(VeneerError, ValueError):
    """Base of the errors about adapter files and their tensors."""


class AdapterFileError(CheckpointError):
    """A file that is missing, truncated, hostile or unreadable."""


class LoadMismatchError(CheckpointError, RuntimeError):
    """Tensors of an adapter that do not fit the model; the message lists all of them."""


class BaseMismatchError(CheckpointError):
    """The adapter was trained on another base model."""


class RoutingError(VeneerError, ValueError):
    """Rows of a batch that cannot go through their adapters."""


class MergeError(VeneerError, ValueError):
    """A merge or unmerge that would give a wrong weight."""


class CombineError(VeneerError, ValueError):
    """Adapters that cannot be combined in this way."""


class ExportError(VeneerError, ValueError):
    """An adapter that another format cannot express, or the reverse."""


class DataError(VeneerError, ValueError):
    """Training or evaluation data that cannot be used."""


class TrainingError(VeneerError, RuntimeError):
    """A training run that cannot start or go on."""


class MissingExtraError(VeneerError, ImportError):
    """An optional library that is not installed, with the line that installs it."""

    def __init__(self, library: str, extra: str, purpose: str | Hint) -> None:
        super().__init__(purpose, f" needs {library}, which is not installed: pip install 'veneer[{extra}]'")
        self.library = library
        self.extra = extra
        self.purpose = purpose

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.library, self.extra, self.purpose), self.__dict__


class VeneerWarning(UserWarning):
    """Something the user should know, though nothing was refused; it takes the same parts as an error."""

    def __init__(self, *parts: str | Hint | Text) -> None:
        self.message = Text(*parts)
        super().__init__(str(self.message))
