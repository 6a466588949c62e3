"""A tiny base model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.training.tiny import saved_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny(tmp_path_factory.mktemp("base"))
