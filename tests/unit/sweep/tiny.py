"""A sweep of six runs of a tiny model."""

from __future__ import annotations

import json
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


def same(place: Path, alone: Path) -> bool:
    """Whether two sweeps came to the same, to the last bit, in whatever time."""
    (best,) = {str((one / "best").readlink()) for one in (place, alone)}
    weights = [(one / best / "adapter_model.safetensors").read_bytes() for one in (place, alone)]
    found = [json.loads((one / "sweep.json").read_text()) for one in (place, alone)]
    for one in found:
        assert set(one.pop("seconds")) == {"training", "evaluation"}
    return weights[0] == weights[1] and found[0] == found[1]
