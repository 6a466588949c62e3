"""docs/exporting.md has the table that the targets make."""

from __future__ import annotations

import subprocess
import sys

from tests.docs.pages import ROOT


def test_the_table_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "exporting_table.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
