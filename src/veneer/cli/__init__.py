"""The command line: one file a command, each a thin face over functions of the library.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to standard output, progress and
messages to standard error.
"""

from __future__ import annotations

from .common import main

__all__ = ["main"]
