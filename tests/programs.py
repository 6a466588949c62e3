"""Programs of the repository that belong to no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_program(monkeypatch: pytest.MonkeyPatch, name: str, path: str) -> ModuleType:
    """The file ``path`` of the repository as the module ``name``, for as long as the test runs."""
    found = importlib.util.spec_from_file_location(name, ROOT / path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, name, module)
    found.loader.exec_module(module)
    return module


def program(path: str) -> ModuleType:
    """The file ``path`` of the repository as a module that stays."""
    with pytest.MonkeyPatch.context() as kept:
        return load_program(kept, Path(path).stem, path)
