"""A tiny base model and an adapter that `veneer train` made for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.words import train_words
from tests.unit.training.tiny import saved_records, saved_tiny
from veneer.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    assert main(train_words(base, saved_records(place / "data.jsonl"), place / "adapter")) == 0
    return place / "adapter"
