"""What a report of a bug needs to know of a machine and its libraries."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .models import cache_dir

LIBRARIES = (
    "veneer", "torch", "safetensors", "transformers", "tokenizers", "peft", "trl", "accelerate", "datasets",
    "bitsandbytes", "torchao", "triton", "diffusers", "huggingface_hub", "typer", "rich",
)  # fmt: skip
#: What matrix products of a CPU depend on, as /proc/cpuinfo writes it.
FEATURES = (
    "avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
#: Environment variables that change what the libraries do; no other is shown.
VARIABLES = (
    "VENEER_CACHE", "VENEER_TRITON", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF", "TORCHDYNAMO_DISABLE",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, processor, devices, threads and cache directories; of the libraries torch alone is loaded."""
    import torch

    name, features = _processor()
    return {
        "versions": {library: _version(library) for library in LIBRARIES},
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "processor": name,
        "cores": os.cpu_count(),
        "cpu_features": features,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "memory": _memory(),
        "cuda": torch.version.cuda,
        "devices": _devices(torch),
        "caches": {"veneer": str(cache_dir()), "hub": str(_hub_cache())},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, list[str]]:
    """(name, the features of `FEATURES` that it has); Linux says both, elsewhere the name alone is known."""
    name = platform.processor() or platform.machine()
    features: list[str] = []
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return name, features
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            has = set(value.split())
            return name, [feature for feature in FEATURES if feature in has]
    return name, features


def _memory() -> int | None:
    """Bytes of main memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _devices(torch: Any) -> list[str]:
    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {about.name}, {about.total_memory / 1e9:.1f} GB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _hub_cache() -> Path:
    """Where huggingface_hub keeps its files, by the variables that it reads."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"
