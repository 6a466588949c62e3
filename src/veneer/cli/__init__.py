"""The command line: one file per command, each a thin layer over functions of the library.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to standard output, progress and
messages to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; ``sys.argv`` when None.

    Returns:
        The exit code.
    """
    try:
        if not sys.stdout.isatty() and not os.environ.get("FORCE_COLOR"):
            # On a build server typer would colour its help without a terminal.
            os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
        # Imported here, so that Ctrl-C during the imports is handled like any other.
        from .common import main as run

        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
