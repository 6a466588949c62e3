"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import TrainingError
from veneer.training.resuming import check_same_run, digest, last_checkpoint, write_json


def checkpoints(place: Path, **states: str | None) -> None:
    for name, state in states.items():
        folder = place / name.replace("_", "-")
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    checkpoints(tmp_path, checkpoint_2="{}", checkpoint_10="{}", checkpoint_12='{"cut', checkpoint_14=None)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_of_several_processes_each_must_have_saved_its_state(tmp_path: Path) -> None:
    checkpoints(tmp_path, checkpoint_2="{}", checkpoint_4="{}")
    for rank in range(2):
        (tmp_path / "checkpoint-2" / f"rng_state_{rank}.pth").touch()
    (tmp_path / "checkpoint-4" / "rng_state_0.pth").touch()
    assert last_checkpoint(tmp_path, processes=2) == tmp_path / "checkpoint-2"
    with pytest.raises(TrainingError, match=r"no complete checkpoint .of 3 processes"):
        last_checkpoint(tmp_path, processes=3)


def test_no_checkpoint_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--save-steps"):
        last_checkpoint(tmp_path / "none")


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    checkpoints(tmp_path, checkpoint_2="{}")
    with pytest.raises(TrainingError, match="not written by veneer train"):
        check_same_run(tmp_path / "checkpoint-2", {})


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
