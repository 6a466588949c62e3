"""Which checkpoint a run goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from veneer import TrainingError
from veneer.training.resuming import (
    RUN_NAME,
    check_same_run,
    complete_checkpoint,
    digest,
    last_checkpoint,
    remove_checkpoint,
    write_json,
)

RECORD: dict[str, Any] = {
    "steps": 20,
    "options": {"seed": 0, "epochs": 2.0, "max_steps": None},
    "adapters": {"default": {"r": 4}},
    "data": "a",
    "evaluation data": "b",
    "processes": 1,
}


def checkpoint(output: Path, step: int, state: str = "{}", files: Sequence[str] = ("optimizer.pt",)) -> Path:
    """A checkpoint that was written to its end."""
    place = output / f"checkpoint-{step}"
    place.mkdir()
    for name, text in (("trainer_state.json", state), *((name, "content") for name in files)):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    complete_checkpoint(place, RECORD, 1.5)
    return place


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 12, state='{"cut')
    (checkpoint(tmp_path, 14) / RUN_NAME).unlink()  # the last that is written
    (tmp_path / "checkpoint-16").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "ref/adapter_model.safetensors", RUN_NAME]
)
def test_a_checkpoint_that_is_half_removed_is_passed_over(name: str, tmp_path: Path) -> None:
    for step in (2, 4):
        checkpoint(tmp_path, step, files=["optimizer.pt", "ref/adapter_model.safetensors"])
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / name).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_checkpoint_with_a_file_that_is_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 4):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_text("con")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_what_says_that_a_checkpoint_is_whole_is_removed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = checkpoint(tmp_path, 4)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed before it begins
    remove_checkpoint(place)
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        last_checkpoint(tmp_path)


def test_of_several_processes_each_must_have_saved_its_state(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, files=["rng_state_0.pth", "rng_state_1.pth"])
    checkpoint(tmp_path, 4, files=["rng_state_0.pth"])
    assert last_checkpoint(tmp_path, processes=2) == tmp_path / "checkpoint-2"
    with pytest.raises(TrainingError, match=r"no complete checkpoint .of 3 processes"):
        last_checkpoint(tmp_path, processes=3)


def test_no_checkpoint_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Start without resume=True; Ctrl-C .* save_steps=N one"):
        last_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("content", [None, "[]", '{"seed": 0}'])
def test_a_checkpoint_of_another_program_is_refused(content: str | None, tmp_path: Path) -> None:
    place = checkpoint(tmp_path, 2)
    (place / RUN_NAME).unlink()
    if content is not None:
        (place / RUN_NAME).write_text(content)
    with pytest.raises(TrainingError, match="of another program"):
        last_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"steps": 30, "options": {"seed": 0, "epochs": 3.0, "max_steps": None}}, None),
        ({"steps": 20, "options": {"seed": 0, "epochs": 2.0, "max_steps": 20}}, None),
        (
            {"steps": 10, "options": {"seed": 0, "epochs": 1.0, "max_steps": None}},
            "epochs was 2.0 and is 1.0",
        ),
        (
            {"steps": 30, "options": {"seed": 1, "epochs": 3.0, "max_steps": None}},
            "seed was 0 and is 1; epochs was 2.0 and is 3.0",
        ),
        (
            {
                "steps": 30,
                "options": {"seed": 0, "epochs": 3.0, "max_steps": None},
                "adapters": {"default": {"r": 8}},
            },
            "epochs was 2.0 and is 3.0; the adapter has another r",
        ),
        ({"processes": 2}, "the processes were 1 and are 2"),
    ],
)
def test_which_run_goes_on_from_a_checkpoint(
    change: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    place = checkpoint(tmp_path, 2)
    if said is None:
        assert check_same_run(place, {**RECORD, **change}) == (1.5, 20)
        return
    with pytest.raises(TrainingError, match="belongs to another run") as refused:
        check_same_run(place, {**RECORD, **change})
    assert said in str(refused.value)


def test_the_digest_knows_order_and_values() -> None:
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    assert digest(rows) == digest([dict(reversed(row.items())) for row in rows])
    assert len({digest(rows), digest(rows[::-1]), digest(rows[:1]), digest([])}) == 4


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert "1" in (tmp_path / "a.json").read_text()
