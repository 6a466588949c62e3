"""What a training run may take: bytes of memory, or a share of the parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import ConfigError

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.I)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A limit for bytes of memory, or for trainable parameters as a share of the base's.

    Attributes:
        text: As the user wrote it.
        memory: Bytes, or None.
        share: Share of the parameters, or None.
    """

    text: str
    memory: int | None = None
    share: float | None = None


def parse_budget(text: str) -> Budget:
    """Parse ``24GB``, ``16 GiB``, ``800M`` or ``1%``."""
    word = text.strip()
    if word.endswith("%"):
        try:
            share = float(word[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise ConfigError(f"a budget in percent must be above 0% and at most 100%, not {text!r}")
        return Budget(word, share=share)
    found = _SIZE.fullmatch(word)
    if found is None:
        raise ConfigError(
            f"a budget is a size such as 24GB, or a share of the parameters such as 1%, not {text!r}"
        )
    number, unit, binary = found[1], found[2].lower(), found[3]
    memory = int(float(number) * (_BINARY if binary and unit else _UNITS)[unit])
    if not unit and memory < 10**6:
        raise ConfigError(f"a budget of {text!r} needs a unit: 24GB, 800MB, or a share such as 1%")
    return Budget(word, memory=memory)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on whatever device."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))
