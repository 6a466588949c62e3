"""docs/tools.md shows what its commands print."""

from __future__ import annotations

import subprocess
import sys

from tests.docs.pages import ROOT


def test_the_outputs_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "tools_page.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
