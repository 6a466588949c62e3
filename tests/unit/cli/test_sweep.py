"""`veneer sweep`: what it prints and where, how it is interrupted, what it refuses."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.tiny import saved_records
from veneer.cli import main
from veneer.sweep import sweep as module
from veneer.sweep.board import Board
from veneer.sweep.options import SweepOptions
from veneer.sweep.trial import trials
from veneer.training.console import PlainConsole
from veneer.training.progress import Terminal
from veneer.training.stopping import Interrupted

HOW = "--max-steps 3 --batch-size 4 --grid lora_r=2,4 --grid learning_rate=1e-3,1e-2".split()


def words(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    return ["sweep", "--model", str(base), "--data", str(data), "--output", str(output), *HOW, *more]


def test_a_sweep_prints_its_table_and_the_best(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = saved_records(tmp_path / "data.jsonl"), tmp_path / "out"
    assert main(words(base, data, out, "--seeds", "2")) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["lora_r", "learning_rate", "held-out", "loss", "steps", "state", "runs"]
    assert [word for line in lines[1:5] for word in line.split() if word in ("done", "stopped")] == [
        "done", "done", "stopped", "stopped",
    ]  # fmt: skip
    assert "trained on" in lines[5] and "of the examples of the whole grid" in lines[5]
    assert re.fullmatch(r"training: [\d,]+ tokens in \d+ s; evaluation: [\d,]+ tokens in \d+ s", lines[6])
    assert lines[7].startswith("best: run-") and lines[7].endswith(f"({out / 'best'})")
    assert "2 of them are set aside for validation" in captured.err
    assert "4 configurations with 2 seeds: 8 runs of 3 steps, compared after 1 and 3; 8 fit" in captured.err
    assert captured.err.count(": stopped after step 1, held-out loss ") == 4
    assert main(words(base, data, out, "--seeds", "2", "--resume", "--json")) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "sweep.json").read_text())


def test_a_file_says_what_to_sweep_and_flags_override_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = saved_records(tmp_path / "data.jsonl"), tmp_path / "sweep.yaml"
    file.write_text(
        f"model: {base}\ndata: {data}\nmax_steps: 2\nvalidation_split: 0.25\ngrid: {{lora_r: [2, 4]}}\n"
    )
    more = ["--output", str(tmp_path / "out"), "--max-steps", "1", "--no-early-stop", "--json"]
    assert main(["sweep", str(file), *more]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [run["state"] for run in found["runs"]] == ["done", "done"]
    assert found["grid"] == {"lora_r": [2, 4]} and found["options"]["max_steps"] == 1
    assert "4 of them are set aside" in captured.err


def test_an_interrupted_sweep_shows_how_to_go_on(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        raise Interrupted(5, 12, tmp_path / "out")

    monkeypatch.setattr(module, "sweep", cut)
    data = saved_records(tmp_path / "data.jsonl")
    assert main(words(base, data, tmp_path / "out", "--no-early-stop")) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-3] == f"Stopped after 5 of at most 12 steps, saved in {tmp_path / 'out'}. To go on:"
    assert said[-2].startswith("  veneer sweep ") and said[-2].endswith(" --resume")
    assert "--grid lora_r=2,4 --grid learning_rate=1e-3,1e-2" in said[-2] and "--no-early-stop" in said[-2]


def test_a_terminal_shows_one_table() -> None:
    options = SweepOptions(model="m", data="d", output="o", max_steps=9)
    every = trials(options, {"learning_rate": [n / 1000 for n in range(1, 30)]}, 16)
    terminal = Terminal()
    terminal.console = PlainConsole(force_terminal=True, width=90, height=12, record=True, file=io.StringIO())
    with Board(terminal, every) as board:
        every[7].state, every[7].step, every[7].losses, every[7].evaluations = "done", 9, [0.5], [0.25]
        every[3].state, every[3].losses = "training", [0.75]
        every[0].state = "stopped"
        board.tell(every[0])
        board.show()
    shown = terminal.console.export_text()
    table = shown[shown.rindex("run ") :].splitlines()
    assert table[0].split() == ["run", "learning_rate", "step", "loss", "held-out", "state"]
    assert table[1].split() == ["run-04", "4e-3", "0/9", "0.750", "training"]
    assert table[2].split() == ["run-08", "8e-3", "9/9", "0.500", "0.250", "done"]
    assert table[10].strip() == "and 20 more; 9 of at most 261 steps taken" and "stopped after" not in shown


def test_a_narrow_terminal_shows_which_run_is_how_far() -> None:
    options = SweepOptions(model="m", data="d", output="o", max_steps=300, seeds=2)
    grid: dict[str, list[Any]] = {
        "learning_rate": [1e-4, 1e-3],
        "lora_target_modules": ["q_proj,v_proj", "all-linear"],
        "lora_alpha": [8.0, 16.0],
        "init_lora_weights": ["true", "orthogonal"],
    }
    every = trials(options, grid, 16)
    terminal = Terminal()
    terminal.console = PlainConsole(force_terminal=True, width=80, height=14, record=True, file=io.StringIO())
    for trial in every:
        trial.state, trial.losses, trial.evaluations = "training", [12.5], [10.25]
    terminal.console.print(Board(terminal, every)._table())
    *table, last = terminal.console.export_text().splitlines()
    assert len(table) < 13 and last.startswith("and ") and last.endswith("steps taken")
    whole = [line.split() for line in table if "run-" in line]
    assert len(whole) >= 4 and whole[0][:2] == ["run-01", "1e-4"]
    assert all(
        line[-5:] == [str(n % 2), "0/300", "12.500", "10.250", "training"] for n, line in enumerate(whole)
    )


def test_elsewhere_there_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SweepOptions(model="m", data="d", output="o", max_steps=9)
    every = trials(options, {"learning_rate": [1e-3, 1e-2]}, 16)
    every[0].state, every[0].step = "training", 4
    with Board(Terminal(), every) as board:
        board.show()
        board.said -= 60.0
        board.show()
    assert capsys.readouterr().err == "  training 1 of 2 runs, 4 of at most 18 steps taken\n"


def test_ray_may_stand_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def watched(options: SweepOptions, *_: Any) -> None:
        found.append((options.ray, options.ray_workers))
        raise Interrupted(5, 12, tmp_path / "out")

    monkeypatch.setattr(module, "sweep", watched)
    monkeypatch.setattr("veneer.sweep.options.require", lambda *_: None)
    data = saved_records(tmp_path / "data.jsonl")
    for more in (["--ray"], ["--ray", "--ray_workers", "2"], ["--ray", "auto"]):
        assert main(words(base, data, tmp_path / "out", *more)) == 130
    assert found == [("local", None), ("local", 2), ("auto", None)]
