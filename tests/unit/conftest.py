"""A tiny base model on disk, adapters, and a hub that cannot be reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit.training.tiny import saved_tiny

if TYPE_CHECKING:
    from tests.unit.integrations.export.adapters import Saved


def contents(place: Path) -> dict[str, bytes]:
    return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}


@contextmanager
def shared(place: Path) -> Iterator[Path]:
    """A directory for all tests of a session, none of which may change anything in it."""
    before = contents(place)
    yield place
    assert contents(place) == before, f"a test has written to {place}, which others read"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with shared(saved_tiny(tmp_path_factory.mktemp("base"))) as place:
        yield place


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Makes adapters of `tests.unit.integrations.export.adapters.CASES`, each once."""
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        from tests.unit.integrations.export.adapters import save

        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp("case"))
        return made[name]

    return get


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a hub that nobody serves; whoever waits to ask it again fails."""
    import datasets
    from huggingface_hub import constants

    endpoint = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))
    return endpoint
