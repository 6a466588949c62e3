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
from safetensors.torch import load_file

from tests.tolerances import TRAINING, assert_close
from tests.unit.training.tiny import RECORDS, saved_tiny
from veneer.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("train")
    saved_tiny(made / "base")
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    (made / "data.jsonl").write_text("".join(lines))
    # Thirteen: two processes have not the same number of them.
    (made / "held-out.jsonl").write_text("".join(lines[:13]))
    return made


def words(place: Path, output: str, *more: str) -> list[str]:
    given = {"model": "base", "data": "data.jsonl", "eval-data": "held-out.jsonl", "output": output}
    return ["train", *(w for name, path in given.items() for w in (f"--{name}", str(place / path))), *more]


def metrics_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return found


def losses_of(metrics: dict[str, Any]) -> list[float]:
    return [entry["loss"] for part in ("losses", "evaluations") for entry in metrics[part]]


def interrupted(command: list[str], code: int | None, **how: Any) -> list[str]:
    """The command that says how to go on, after Ctrl-C at a fifth of the steps."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **how,
    ) as run:
        said = []
        for line in run.stderr:
            said.append(line.strip())
            if line.startswith("  training ") and len([s for s in said if s.startswith("training ")]) == 1:
                os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all processes of the job
        assert run.wait() == code if code is not None else run.wait() != 0, said
        assert run.stdout.read() == ""
    assert sum("again to leave at once" in line for line in said) == 1, said
    (again,) = [line for line in said if line.startswith("veneer train")]
    return shlex.split(again)[1:]


def test_interrupted_it_says_how_to_go_on_to_the_same_losses(place: Path) -> None:
    how = "--max-steps 100 --batch-size 4 --gradient-accumulation-steps 2 --lora-dropout 0.1".split()
    command = interrupted([sys.executable, "-m", "veneer", *words(place, "cut", *how)], 130)
    assert not (place / "cut" / "adapter_model.safetensors").exists()
    assert main(command) == 0
    assert main(words(place, "whole", *how)) == 0
    cut, whole = (metrics_of(place / name) for name in ("cut", "whole"))
    assert cut["losses"] == whole["losses"] and cut["evaluations"] == whole["evaluations"]


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no"
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "accelerate": [*ACCELERATE.split(), "--dynamo_backend", "no", "--main_process_port"],
}
ON_CPU = {"env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}}


def launched(launcher: str, command: list[str]) -> list[str]:
    """Two processes of a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [sys.executable, "-m", *LAUNCHERS[launcher], port, "-m", "veneer", *command]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_have_the_losses_and_the_adapter_of_one(launcher: str, place: Path) -> None:
    how = "--epochs 2 --learning-rate 0.01 --gradient-accumulation-steps 2 --eval-steps 2".split()
    alone, together = place / f"one-{launcher}", place / launcher
    assert main(words(place, alone.name, *how, "--batch-size", "4")) == 0
    two = words(place, together.name, *how, "--batch-size", "2")
    done = subprocess.run(launched(launcher, two), capture_output=True, text=True, **ON_CPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter (") == 1 and done.stderr.count("training 4/4") == 1
    one, both = metrics_of(alone), metrics_of(together)
    assert (one["processes"], both["processes"]) == (1, 2)
    assert_close(torch.tensor(losses_of(both)), torch.tensor(losses_of(one)), TRAINING)
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())
    ours, theirs = (load_file(output / "adapter_model.safetensors") for output in (together, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, TRAINING)


@pytest.mark.slow
def test_two_interrupted_processes_go_on_to_the_same_adapter(place: Path) -> None:
    how = "--max-steps 50 --batch-size 2 --lora-dropout 0.1".split()
    again = interrupted(launched("torchrun", words(place, "cut-two", *how)), None, **ON_CPU)
    assert not (place / "cut-two" / "adapter_model.safetensors").exists()
    for command in (again, words(place, "whole-two", *how)):
        done = subprocess.run(launched("torchrun", command), capture_output=True, text=True, **ON_CPU)
        assert done.returncode == 0, done.stderr
    cut, whole = (place / name for name in ("cut-two", "whole-two"))
    assert losses_of(metrics_of(cut)) == losses_of(metrics_of(whole))
    ours, theirs = (load_file(output / "adapter_model.safetensors") for output in (cut, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_two_processes_that_are_finished_do_not_train_again(place: Path) -> None:
    how = "--max-steps 5 --save-steps 2 --batch-size 2 --lr-scheduler-type constant".split()
    output = place / "finished-two"
    command = words(place, output.name, *how)
    done = subprocess.run(launched("torchrun", command), capture_output=True, text=True, **ON_CPU)
    assert done.returncode == 0, done.stderr
    whole, adapter = metrics_of(output), (output / "adapter_model.safetensors").read_bytes()
    for name in ("adapter_model.safetensors", "metrics.json", "veneer_run.json"):
        (output / name).unlink()
    for said in ("only to write", "is finished"):
        again = subprocess.run(
            launched("torchrun", [*command, "--resume"]), capture_output=True, text=True, **ON_CPU
        )
        assert again.returncode == 0, again.stderr
        assert again.stderr.count(said) == 1 and "training 5/5" not in again.stderr
        assert metrics_of(output)["losses"] == whole["losses"]
        assert (output / "adapter_model.safetensors").read_bytes() == adapter


def test_shards_that_nobody_would_make_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded: accelerate itself would train without shards and say nothing."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert main(words(place, "sharded")) == 1
    said = capsys.readouterr().err
    assert "FSDP2" in said and "Traceback" not in said
    assert not (place / "sharded").exists()
