"""llama.cpp's own converter of adapters to GGUF, where it is installed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ...errors import ExportError

CONVERTER = "convert_lora_to_gguf.py"


def converter() -> str | None:
    """The converter on the PATH."""
    return shutil.which(CONVERTER, mode=0)


def command(base: str, adapter: Path, out: Path) -> str:
    """The command line: factors as 32-bit floats, which loses nothing.

    Args:
        base: Directory or hub id of the base, whose configuration the converter reads.
        adapter: Directory with what it reads.
        out: The file to write.
    """
    line = "python convert_lora_to_gguf.py --base-model-id {} --outfile {} {}"
    if Path(base).is_dir():
        line = "python convert_lora_to_gguf.py --base {} --outfile {} {}"
    return line.format(*(shlex.quote(str(part)) for part in (base, out, adapter)))


def convert(program: str, base: str, adapter: Path, out: Path) -> None:
    """Run the converter as `command` says.

    Raises:
        ExportError: It failed; with its last words.
    """
    words = [*_started(program), *shlex.split(command(base, adapter, out))[2:]]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    if done.returncode or not out.is_file():
        last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-5:])
        raise ExportError(
            f"llama.cpp's converter {program} failed:\n{last}\n"
            "Take it off the PATH to get the files that it reads"
        )


def _started(program: str) -> list[str]:
    """A script of Python is run by this interpreter, which has what it imports."""
    with open(program, "rb") as file:
        first = file.readline(200)
    return [sys.executable, program] if b"python" in first and first.startswith(b"#!") else [program]
