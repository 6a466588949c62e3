"""The collector of garbage, asked to wait where much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """A context in which Python does not look for garbage, if it did before; what has no cycle goes as ever.

    Some ten thousand new objects have all those of torch looked through too, which takes as long as importing
    this package does. For short stretches that make what will stay.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
