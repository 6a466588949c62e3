"""What goes to standard error: an error in the words of the command line, warnings, nobody else's noise."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..atomic import disk_is_full
from ..errors import Text, VeneerWarning
from ..training.planning.limits import out_of_memory
from ..wording import first_line, visible


class Flag(NamedTuple):
    """How an option is given on the command line.

    Attributes:
        on: The flag.
        off: The flag that says no, where there is one.
        switch: Whether it stands alone, without a value.
    """

    on: str
    off: str | None = None
    switch: bool = False

    def given(self, value: object) -> str | None:
        """What to type for a value, the flag alone where there is none; None where it cannot be typed."""
        if value is ...:
            return self.on
        if self.switch:
            return self.on if value else self.off
        return (
            None if value is None else f"{self.on} {str(value).lower() if isinstance(value, bool) else value}"
        )


def say(line: str) -> None:
    print(visible(line, lines=True), file=sys.stderr, flush=True)


def quieten(flags: Callable[[], Mapping[str, Flag]]) -> None:
    """Veneer's own warnings as one line each; other libraries' notices not at all.

    Args:
        flags: Gives the flags of the command that runs, by the option's name.
    """

    def show(message: Warning | str, category: type[Warning], *details: Any, **more: Any) -> None:
        if isinstance(message, VeneerWarning):
            say("warning: " + in_flags(message.message, flags()))

    warnings.showwarning = show
    # What torchao, bitsandbytes and others log when they are imported goes through this handler.
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
    # torch has a handler of its own, and torchao gives it cause on being imported.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("TORCH_LOGS", "-torch"),  # errors only
    ):
        os.environ.setdefault(name, value)
    if "torch" in sys.modules:  # it has read its variables already
        logging.getLogger("torch").setLevel(logging.ERROR)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: compiled modules report it as one of their own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def of_system(error: BaseException) -> str | None:
    """An error of the machine in one sentence with the way out, or None where it is something else."""
    if disk_is_full(error):
        place = getattr(error, "filename", None)
        where = f" while {place} was written" if place else ""
        return f"the disk is full{where} ({_reason(error)}). Free some space, or write to another disk."
    if out_of_memory(error):
        return (
            f"out of memory ({_reason(error)}). Smaller batches (--batch-size), shorter examples "
            "(--max-length) or a smaller type (--dtype bfloat16) take less, where the command has them."
        )
    if isinstance(error, OSError):
        return _reason(error) if error.filename is None else f"{error.filename}: {_reason(error)}"
    return None


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or first_line(error))


def unexpected(error: BaseException) -> str:
    """An error that nobody foresaw, with whose it is."""
    frames = traceback.extract_tb(error.__traceback__)
    owner = "veneer"
    for frame in frames:
        if found := re.search(r"[/\\](?:site|dist)-packages[/\\](\w+)", frame.filename):
            owner = found[1]
        elif "veneer" in frame.filename:
            owner = "veneer"
    kind, words = type(error).__name__, str(error).strip() or "no message"
    whose = "This is a bug in Veneer." if owner == "veneer" else f"It was raised in {owner}."
    return f"unexpected {kind}: {words}\n{whose} --verbose shows the traceback."


def in_flags(message: Text, flags: Mapping[str, Flag]) -> str:
    """A message of the library with the flags of the command in the place of Python's options.

    Args:
        message: As the library makes it.
        flags: Name of an option -> its flag, of the command that runs.
    """
    return message.written(
        lambda hint: None if (flag := flags.get(hint.option)) is None else flag.given(hint.value)
    )
