"""Pages of the documentation that are made from the code: written, or only held against what lies there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(description: str | None, page: Callable[[], str], place: Path) -> int:
    """Write a page; with ``--check`` only say whether it is current.

    Returns:
        The exit code: 1 where ``--check`` found another text.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is out of date")
    check = parser.parse_args().check
    text = page()
    if not check:
        place.write_text(text, encoding="utf-8")
        return 0
    if place.is_file() and place.read_text(encoding="utf-8") == text:
        return 0
    name, script = place.relative_to(ROOT), Path(sys.argv[0]).name
    print(f"{name} is out of date: run `python tools/{script}`", file=sys.stderr)
    return 1
