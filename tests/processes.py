"""Run code in a fresh interpreter: for what depends on what is imported, installed or set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_python(
    code: str,
    *arguments: str | Path,
    python: str | Path = sys.executable,
    env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 300,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `code` in `python`; a variable given as None in `env` is unset."""
    environment = {**os.environ, **{name: value for name, value in (env or {}).items() if value is not None}}
    for name in [name for name, value in (env or {}).items() if value is None]:
        environment.pop(name, None)
    done = subprocess.run(
        [str(python), "-c", code, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
