"""A sweep of six runs of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.unit.training.tiny import saved_records
from veneer.sweep.options import SweepOptions

GRID = {"lora_r": [2, 4], "learning_rate": [1e-3, 1e-2, 3e-2]}


def tiny_options(base: Path, place: Path, **more: Any) -> SweepOptions:
    """Options of a sweep over a saved model, with records that are saved in a directory."""
    data = str(saved_records(place / "data.jsonl"))
    return SweepOptions(
        model=str(base),
        data=data,
        eval_data=data,
        output="out",
        max_steps=6,
        batch_size=4,
        lora_dropout=0.1,
        **more,
    )
