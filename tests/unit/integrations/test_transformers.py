"""What makes transformers' Trainer take a Veneer model for the adapter that it is."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from veneer import MissingExtraError
from veneer.integrations import transformers as ours


class Absent:
    """A finder that knows of no transformers."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_without_transformers_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", *ours.NAMES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"pip install 'veneer\[hf\]'"):
        ours.enable_trainer()
