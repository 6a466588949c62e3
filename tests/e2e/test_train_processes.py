"""`veneer train` as processes: interrupted and gone on with, and several that share the work."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import TRAINING, assert_close
from tests.unit.training.tiny import RECORDS, saved_tiny
from veneer.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("train")
    saved_tiny(made / "base")
    # Thirteen: of the last step of an epoch the second process gets nothing.
    lines = [json.dumps(record) + "\n" for record in RECORDS[:13]]
    (made / "data.jsonl").write_text("".join(lines))
    return made


def words(place: Path, output: str, *more: str) -> list[str]:
    given = {"model": "base", "data": "data.jsonl", "eval-data": "data.jsonl", "output": output}
    return ["train", *(w for name, path in given.items() for w in (f"--{name}", str(place / path))), *more]


def metrics_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return found


def losses_of(metrics: dict[str, Any]) -> list[float]:
    return [entry["loss"] for part in ("losses", "evaluations") for entry in metrics[part]]


def test_interrupted_it_says_how_to_go_on_to_the_same_losses(place: Path) -> None:
    how = "--max-steps 100 --batch-size 4 --gradient-accumulation-steps 2 --lora-dropout 0.1".split()
    with subprocess.Popen(
        [sys.executable, "-m", "veneer", *words(place, "cut", *how)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        said = []
        for line in run.stderr:
            said.append(line.strip())
            if line.startswith("  training 20/"):
                run.send_signal(signal.SIGINT)
        assert run.wait() == 130, said
        assert run.stdout.read() == ""
    assert not (place / "cut" / "adapter_model.safetensors").exists()
    assert any("once more leaves at once" in line for line in said)
    (command,) = [line for line in said if line.startswith("veneer train")]
    assert main(shlex.split(command)[1:]) == 0
    assert main(words(place, "whole", *how)) == 0
    cut, whole = (metrics_of(place / name) for name in ("cut", "whole"))
    assert cut["losses"] == whole["losses"] and cut["evaluations"] == whole["evaluations"]


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no"
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "accelerate": [*ACCELERATE.split(), "--dynamo_backend", "no", "--main_process_port"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_have_the_losses_of_one(launcher: str, place: Path) -> None:
    how = "--epochs 2 --learning-rate 0.01 --gradient-accumulation-steps 2 --eval-steps 2".split()
    assert main(words(place, f"one-{launcher}", *how, "--batch-size", "6")) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two = words(place, launcher, *how, "--batch-size", "3")
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], port, "-m", "veneer", *two],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter (") == 1 and done.stderr.count("training 4/4") == 1
    one, both = metrics_of(place / f"one-{launcher}"), metrics_of(place / launcher)
    assert (one["processes"], both["processes"]) == (1, 2)
    assert_close(torch.tensor(losses_of(both)), torch.tensor(losses_of(one)), TRAINING)
