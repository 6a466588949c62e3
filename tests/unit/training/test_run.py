"""A whole run: what stands against it is said before anything is read or made."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import TrainingError
from veneer.training.options import RunOptions
from veneer.training.run import fine_tune


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_asks_for_shards_is_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    options = RunOptions(model="nowhere", data="nowhere", output=str(tmp_path / "out"))
    with pytest.raises(TrainingError, match=f"{variable} asks for a model in shards"):
        fine_tune(options)
    assert not (tmp_path / "out").exists()
