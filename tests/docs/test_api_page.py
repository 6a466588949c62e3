"""The page of what there is says what there is."""

from __future__ import annotations

import subprocess
import sys

from tests.docs.pages import ROOT


def test_the_page_is_made_from_the_code() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "api_page.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
