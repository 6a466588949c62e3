"""Releases that `tools/examples_data.py` fetches, in the place of the installed ones."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: What programs begin with: these releases import names that torchao no longer has, wherever it is installed.
WITHOUT_TORCHAO = """
import sys
sys.modules["torchao"] = None
"""


def variables(*names: str) -> dict[str, str]:
    """The environment of a process that finds these folders of .cache/data before what is installed."""
    folders = [ROOT / ".cache" / "data" / name for name in names]
    assert all(folder.is_dir() for folder in folders), "make examples-data fetches them"
    return {"PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT / "src", ROOT]))}
