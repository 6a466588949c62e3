"""TRL's trainers as a run makes them: which, in what order, and what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.tiny import Told
from veneer import ConfigError, MissingExtraError, TrainingError
from veneer.training import RunOptions
from veneer.training.run import fine_tune


def given(base: Path, place: Path, method: str, **more: Any) -> dict[str, Any]:
    lines = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    if method == "kto":
        lines = [{"prompt": f"{n}", "completion": "ab"[n % 2], "label": n % 2 == 0} for n in range(4)]
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = {"method": method, "max_steps": 1, "batch_size": 2, "lora_r": 2, **more}
    return {"model": str(base), "data": str(place / "data.jsonl"), "output": str(place / "out"), **how}


def test_what_trl_refuses_is_one_line(base: Path, tmp_path: Path) -> None:
    options = RunOptions(**given(base, tmp_path, "kto", lora_target_modules="lm_head"))
    with pytest.raises(TrainingError, match=r"TRL's KTOTrainer refuses: .*lm_head"):
        fine_tune(options)


def test_a_trl_without_a_trainer_is_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.orpo", None)
    with pytest.raises(MissingExtraError, match="ORPOTrainer"):
        fine_tune(RunOptions(**given(base, tmp_path, "orpo")))


def test_a_reward_model_stays_one(base: Path, tmp_path: Path) -> None:
    options = given(base, tmp_path, "reward")
    metrics = fine_tune(RunOptions(**options), Told())
    assert metrics["label_names"] == ["reward"]
    more = {"data": options["data"], "resume_from_adapter": options["output"], "max_steps": 1}
    again = fine_tune(RunOptions(**more, output=str(tmp_path / "again")), Told())
    assert again["options"]["method"] == "reward" and again["label_names"] == ["reward"]
    with pytest.raises(ConfigError, match=r"Leave out method='dpo' \(the adapter has reward\)"):
        fine_tune(RunOptions(**more, output="out", method="dpo"))
