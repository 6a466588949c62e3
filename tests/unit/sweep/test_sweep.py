"""Sweeps of a tiny model: what they write, that runs do not touch one another, that they resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import FAMILY, assert_close
from tests.unit.sweep.tiny import GRID, tiny_options
from tests.unit.training.tiny import RECORDS, Told
from veneer import Family, PeftModel
from veneer.errors import TrainingError
from veneer.sweep import sweep as module
from veneer.sweep.options import SweepOptions
from veneer.sweep.sweep import sweep
from veneer.training import Collator, answer_loss, encode, load_base
from veneer.training.scores import accuracy
from veneer.training.stopping import Interrupted, Stop


@pytest.fixture(scope="module")
def options(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepOptions:
    return tiny_options(base, tmp_path_factory.mktemp("data"), warmup_steps=1)


@pytest.fixture(scope="module")
def whole(options: SweepOptions, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("whole") / "out"
    return place, sweep(replace(options, output=str(place)), GRID)


def losses(found: dict[str, Any]) -> dict[str, list[float]]:
    return {run["name"]: [*run["losses"], *(e["loss"] for e in run["evaluations"])] for run in found["runs"]}


def test_a_sweep_leaves_ordinary_adapters_and_what_it_found(whole: tuple[Path, dict[str, Any]]) -> None:
    place, found = whole
    assert json.loads((place / "sweep.json").read_text()) == found
    done = [run["name"] for run in found["runs"] if run["state"] == "done"]
    assert len(done) == 2 and {run["step"] for run in found["runs"]} == {2, 6}
    names = {path.name for path in place.iterdir()}
    assert names == {*done, "best", "sweep.json", "sweep.md", "sweep.png"}
    assert (place / "best").resolve() == place / found["best"]
    assert found["examples"] == {"trained": 4 * 2 * 6 + 2 * 4 * 4, "grid": 6 * 6 * 4}
    table = (place / "sweep.md").read_text().splitlines()
    assert len(table) == 8 and "| done |" in table[2] and found["best"] in table[2]
    model, tokenizer = load_base(found["options"]["model"])
    adapted = PeftModel.from_pretrained(model, place / "best")
    rows = encode(RECORDS, tokenizer).rows
    (length,) = {len(row["input_ids"]) for row in rows}
    evaluations = 1 + sum(len(run["evaluations"]) for run in found["runs"])  # the base's, too
    expected = {"training": found["examples"]["trained"], "evaluation": evaluations * len(rows)}
    assert found["tokens"] == {what: count * length for what, count in expected.items()}
    assert all(seconds > 0 for seconds in found["seconds"].values())
    best = found["configurations"][0]
    collate = Collator(tokenizer.pad_token_id)
    assert_close(torch.tensor(answer_loss(adapted, rows, collate)), torch.tensor(best["mean"]), FAMILY)
    assert best["mean"] < found["base"]
    config = json.loads((place / "best" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == found["options"]["model"]
    metrics = json.loads((place / "best" / "metrics.json").read_text())
    assert metrics["steps"] == 6 and len(metrics["losses"]) == 6


def test_runs_in_packs_of_one_are_those_of_one_pass(
    whole: tuple[Path, dict[str, Any]],
    options: SweepOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []
    step = Family.forward_backward

    def watched(family: Family, batches: Any, *more: Any, **options: Any) -> Any:
        passes.append(len(batches))
        if len(batches) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return step(family, batches, *more, **options)

    monkeypatch.setattr(Family, "forward_backward", watched)
    told = Told()
    # Without dropout: what is drawn for a pass that fails is not drawn again.
    alike = replace(options, lora_dropout=0.0)
    found = sweep(replace(alike, output=str(tmp_path / "one")), GRID, told)
    assert sorted({*passes}, reverse=True)[0] == 6 and passes.count(1) == 4 * 2 + 2 * 6
    assert "Out of memory with 6 runs at once: half as many from here on." in told.lines
    monkeypatch.undo()
    together = sweep(replace(alike, output=str(tmp_path / "six")), GRID)
    for name, values in losses(together).items():
        assert_close(torch.tensor(losses(found)[name]), torch.tensor(values), FAMILY)


def test_one_run_that_does_not_fit_is_refused(
    options: SweepOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(error: Exception) -> Any:
        def call(*_: Any, **__: Any) -> None:
            raise error

        return call

    monkeypatch.setattr(Family, "forward_backward", raising(MemoryError()))
    with pytest.raises(TrainingError, match=r"out of memory with run-. alone.*batch_size"):
        sweep(replace(options, output=str(tmp_path / "1")), GRID)
    monkeypatch.setattr(Family, "forward_backward", raising(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        sweep(replace(options, output=str(tmp_path / "2")), GRID)
    with pytest.raises(TrainingError, match="memory='100kB' is too little"):
        sweep(replace(options, output=str(tmp_path / "3"), memory="100kB"), GRID)


def test_a_classifier_is_swept_with_its_head(options: SweepOptions, tmp_path: Path) -> None:
    data = tmp_path / "labels.jsonl"
    records = [{"text": f"{n}.", "label": "high" if n > 17 else "low"} for n in range(10, 26)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = replace(options, task="seq-cls", data=str(data), eval_data=str(data), max_steps=12)
    found = sweep(replace(given, output=str(tmp_path / "out")), {"learning_rate": [1e-3, 3e-2]})
    metrics = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    assert metrics["label_names"] == ["high", "low"]
    model, tokenizer = load_base(options.model, label_names=["high", "low"])
    adapted = PeftModel.from_pretrained(model, tmp_path / "out" / "best")
    score = accuracy(adapted, tokenizer, records, ["high", "low"]).scores["adapter"]
    best = found["configurations"][0]
    assert_close(torch.tensor(score.loss), torch.tensor(best["mean"]), FAMILY)
    assert best["mean"] < 0.9 * found["base"]


def test_a_run_that_diverges_is_stopped_and_the_others_go_on(options: SweepOptions, tmp_path: Path) -> None:
    told = Told()
    grid = {"learning_rate": [1e-2, 1e30, 2e-2]}
    found = sweep(replace(options, output=str(tmp_path / "out"), early_stop=False), grid, told)
    assert [run["state"] for run in found["runs"]] == ["done", "diverged", "done"]
    (line,) = (line for line in told.lines if "diverged" in line)
    assert "run-2 (learning_rate=1e+30): diverged after step" in line
    assert found["best"] in ("run-1", "run-3")
    with pytest.raises(TrainingError, match="no run came to its end: all of them diverged"):
        sweep(replace(options, output=str(tmp_path / "none")), {"learning_rate": [1e30, 1e31]})


def test_a_disk_that_is_full_leaves_a_sweep_that_goes_on_or_nothing(
    options: SweepOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    own, grid = (
        replace(options, output=str(tmp_path / "deep" / "out"), max_steps=1),
        {"learning_rate": [1e-3]},
    )
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(TrainingError, match=r"out: No space left on device\. Nothing was trained yet"):
            sweep(own, grid)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_files", full)
        with pytest.raises(TrainingError, match=r"No space left .* resume=True goes on from what was saved"):
            sweep(own, grid)
    assert sweep(replace(own, resume=True), grid)["finished"]


class StopAfter(Stop):
    def __init__(self, looks: int) -> None:
        self.left = looks

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left < 0


@contextmanager
def stopped_after(looks: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @contextmanager
    def signals(say: Any) -> Iterator[Stop]:
        yield StopAfter(looks)

    with monkeypatch.context() as patched:
        patched.setattr(module, "stop_on_signals", signals)
        yield


def test_a_sweep_resumes_bit_for_bit(
    whole: tuple[Path, dict[str, Any]],
    options: SweepOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = replace(options, output=str(tmp_path / "cut"))
    for looks, resume in ((0, False), (1, True), (3, True)):
        with stopped_after(looks, monkeypatch), pytest.raises(Interrupted) as left:
            sweep(replace(cut, resume=resume), GRID)
        assert len(list((tmp_path / "cut").glob("state-*"))) == 1
    assert left.value.step > 0 and left.value.checkpoint == tmp_path / "cut"
    with pytest.raises(TrainingError, match=r"contains a sweep. Continue it with resume=True"):
        sweep(cut, GRID)
    with pytest.raises(TrainingError, match=r"another sweep: seed was 0 and is 7; grid was \{"):
        sweep(replace(cut, resume=True, seed=7), {"lora_r": [2, 4]})
    found = sweep(replace(cut, resume=True), GRID)
    place, expected = whole
    assert losses(found) == losses(expected) and found["best"] == expected["best"]
    weights = f"{found['best']}/adapter_model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (place / weights).read_bytes()
    told = Told()
    (tmp_path / "cut" / "best").unlink()
    assert sweep(replace(cut, resume=True), GRID, told) == found
    assert (tmp_path / "cut" / "best").resolve() == tmp_path / "cut" / found["best"]
    assert any("is finished: nothing is left to train" in line for line in told.lines)


def test_what_was_saved_last_survives_a_crash(
    whole: tuple[Path, dict[str, Any]],
    options: SweepOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = replace(options, output=str(tmp_path / "cut"))
    with monkeypatch.context() as patched:
        patched.setattr(module, "SAVE_SECONDS", 0.0)
        patched.setattr(module.Sweep, "_keep", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sweep(cut, GRID)
    assert losses(sweep(replace(cut, resume=True), GRID)) == losses(whole[1])
    (tmp_path / "cut" / "sweep.json").write_text("{}")
    with pytest.raises(TrainingError, match="is not the record of a sweep"):
        sweep(replace(cut, resume=True), GRID)


def test_a_system_without_links_gets_a_line(
    options: SweepOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    told = Told()
    short = replace(options, output=str(tmp_path / "out"), max_steps=1, gradient_checkpointing=True)
    found = sweep(short, {"learning_rate": [1e-3]}, told)
    assert told.lines[-1] == f"No link best -> {found['best']} could be made here: no links here"
