"""What does extracting an adapter from a tuned model take beside mergekit, and how near does it come?

The first layers of the demo's base, SmolLM2-135M, and a copy whose linears were changed by 1 % of their
norm, with singular values that fall as 1/k. Both sides read and write the same files, each in a fresh process
and twice: the first time imports what is needed, the second one is measured. Memory is the peak of the
process. mergekit is told to leave out what did not change; it is installed into `build/mergekit`, without its
dependencies.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks._models import LINEARS, llama
from benchmarks.harness import (
    ROOT,
    Figure,
    Report,
    Row,
    in_fresh_process,
    memory,
    question,
    ratio,
    take_turns,
)
from tools.readers_setup import once
from veneer.training.libraries import quiet_libraries

RANK, CHANGE, LAYERS = 16, 0.01, 3
SIDES = ("veneer", "mergekit")
MERGEKIT, PINS = ROOT / "build" / "mergekit", ROOT / "requirements" / "mergekit.txt"
#: What of the model did not change.
LEFT_OUT = ("embed_tokens", "lm_head")
FEW, MANY = 2, 8


def install() -> None:
    """mergekit beside the environment's torch and transformers, whose versions it would change."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(MERGEKIT)]
    once(MERGEKIT, PINS, [command])


def cut(model: Path, place: Path) -> None:
    """The first layers of a model as one."""
    from transformers import AutoModelForCausalLM

    with quiet_libraries():  # transformers would list the layers that are left out
        AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=LAYERS).save_pretrained(place)


def tune(base: Path, tuned: Path) -> None:
    """A copy of a model with changed linears."""
    tuned.mkdir()
    for file in base.glob("*.json"):
        (tuned / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if name.removesuffix(".weight").rpartition(".")[2] in LINEARS:
            side = min(weight.shape)
            u, v = (torch.randn(size, side, generator=generator) for size in weight.shape)
            change = (u / torch.arange(1, side + 1)) @ v.T
            change *= CHANGE * weight.float().norm() / change.norm()
            tensors[name] = (weight.float() + change).to(weight.dtype)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})


def extract(side: str, base: str, tuned: str, place: str, rank: int = RANK) -> dict[str, float]:
    """Seconds of the processor for the second time, and bytes at the peak; in a process of its own."""
    torch.set_num_threads(1)  # a second one would count as time while it waits
    os.environ["HF_HUB_OFFLINE"] = "1"
    call = {"veneer": _veneer, "mergekit": _mergekit}[side](base, tuned, place, rank)
    call()
    start = time.process_time()
    call()
    return {"s": time.process_time() - start, "bytes": memory("VmHWM")}


def _veneer(base: str, tuned: str, place: str, rank: int) -> Any:
    from veneer.tools import extract_adapter

    return partial(extract_adapter, base, tuned, place, rank=rank, overwrite=True)


def _mergekit(base: str, tuned: str, place: str, rank: int) -> Any:
    sys.path.append(str(MERGEKIT))
    from mergekit.scripts.extract_lora import main

    words = ["--base-model", base, "--model", tuned, "--out-path", place, "--max-rank", str(rank)]
    words += [word for name in LEFT_OUT for word in ("-e", name)]
    return partial(main, [*words, "--skip-undecomposable"], standalone_mode=False)


def error(base: Path, tuned: Path, place: Path) -> float:
    """``‖ΔW − BA‖ / ‖ΔW‖`` over all linears, in float64; the same formula for both sides."""
    missed = whole = 0.0
    factors = load_file(place / "adapter_model.safetensors")
    with (
        safe_open(base / "model.safetensors", "pt") as one,
        safe_open(tuned / "model.safetensors", "pt") as two,
    ):
        for name in one.keys():  # noqa: SIM118 - no mapping
            path = name.removesuffix(".weight")
            if path.rpartition(".")[2] in LINEARS:
                a, b = (factors[f"base_model.model.{path}.lora_{factor}.weight"].double() for factor in "AB")
                change = two.get_tensor(name).double() - one.get_tensor(name).double()
                whole += float(change.norm()) ** 2
                missed += float((change - b @ a).norm()) ** 2
    return float((missed / whole) ** 0.5)


def growth(folder: Path) -> float:
    """Bytes of peak memory that a further layer takes, in bytes of its weights."""
    peaks, sizes = [], []
    for layers in (FEW, MANY):
        base, tuned = folder / f"base-{layers}", folder / f"tuned-{layers}"
        model = llama(576, layers, torch.float32, head=True)
        model.save_pretrained(base)
        sizes.append((base / "model.safetensors").stat().st_size)
        del model
        tune(base, tuned)
        places = {"base": str(base), "tuned": str(tuned), "place": str(folder / f"adapter-{layers}")}
        peaks.append(in_fresh_process(extract, side="veneer", **places, rank=1)["bytes"])
    return (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])


def measure(quick: bool) -> Report:
    from tools.smollm2 import fetch

    install()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        base, tuned = folder / "base", folder / "tuned"
        cut(fetch(), base)
        tune(base, tuned)
        peaks: dict[str, list[float]] = {side: [] for side in SIDES}

        def one(side: str) -> float:
            places = {"base": str(base), "tuned": str(tuned), "place": str(folder / side)}
            found = in_fresh_process(extract, side=side, **places)
            peaks[side].append(found["bytes"] / 1e6)
            return float(found["s"])

        times = take_turns({side: partial(one, side) for side in SIDES}, rounds=1 if quick else 3, warm_up=0)
        errors = {side: 100 * error(base, tuned, folder / side) for side in SIDES}
        grown = growth(folder)
    beside = {
        what: {"mergekit": Figure.of(found["mergekit"])} for what, found in (("s", times), ("MB", peaks))
    }
    rows = [
        Row("processor time ÷ mergekit's", ratio(times["veneer"], times["mergekit"]), at_most=0.5),
        Row("processor time", Figure.of(times["veneer"]), "s", beside=beside["s"]),
        Row("peak memory ÷ mergekit's", ratio(peaks["veneer"], peaks["mergekit"]), at_most=1.0),
        Row("peak memory", Figure.of(peaks["veneer"]), "MB", beside=beside["MB"]),
        Row(
            "error",
            Figure.exact(errors["veneer"]),
            "%",
            beside={"mergekit": Figure.exact(errors["mergekit"])},
        ),
        Row("error ÷ mergekit's", Figure.exact(errors["veneer"] / errors["mergekit"]), at_most=1.001),
        Row(
            f"peak memory of a further layer ÷ its weights, {FEW} to {MANY}",
            Figure.exact(grown),
            at_most=0.1,
        ),
    ]
    return Report(
        question(__doc__),
        rows,
        {"model": f"{LAYERS} layers of SmolLM2-135M, {7 * LAYERS} linears", "rank": RANK, **versions()},
    )


def versions() -> dict[str, str]:
    lines = (line.partition("==") for line in PINS.read_text().splitlines() if line.startswith("mergekit"))
    return {name: version for name, _, version in lines}
