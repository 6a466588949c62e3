"""Write what the commands of docs/tools.md print; with ``--check`` only say whether it is current."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import made_page
from made_page import ROOT

PAGE = ROOT / "docs" / "tools.md"
_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.M | re.S)


def page() -> str:
    """The page with new outputs in it; its blocks run one after the other in an empty directory."""
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(work)
        try:
            return _BLOCK.sub(lambda found: _with_output(found, names), text)
        finally:
            os.chdir(before)


def _with_output(found: re.Match[str], names: dict[str, Any]) -> str:
    language, code, shown = found.groups()
    if language == "bash" and shown is None:  # a command whose output the page does not show
        return found[0]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
        else:
            from veneer.cli import main

            for line in code.replace("\\\n", " ").splitlines():
                main(shlex.split(line)[1:])
    block = f"```{language}\n{code}```\n"
    printed = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return block if shown is None else f"{block}```text\n{printed}\n```\n"


if __name__ == "__main__":
    sys.exit(made_page.main(__doc__, page, PAGE))
