"""Registering a plug-in for the duration of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from veneer import layers, variants
from veneer.backends import base as backends
from veneer.config import PLUGIN_INITS
from veneer.inits import base as inits
from veneer.registry import load_plugins


@contextmanager
def registered_for_now() -> Iterator[None]:
    """A context after which every layer, initialisation, variant and backend defined in it is forgotten."""
    load_plugins()
    held: list[Any] = [
        variants.registry._items,
        layers.registry._items,
        PLUGIN_INITS,
        inits._inits,
        backends._backends,
        backends._geometries,
    ]
    before = [container.copy() for container in held]
    try:
        yield
    finally:
        for container, contents in zip(held, before, strict=True):
            container.clear()
            container.extend(contents) if isinstance(container, list) else container.update(contents)
