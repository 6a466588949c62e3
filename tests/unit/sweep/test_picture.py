"""The picture of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer.sweep import picture as module


@pytest.mark.parametrize(("worst", "cut"), [(2.4, False), (7.0, True)])
def test_a_run_far_above_the_base_does_not_set_the_scale(
    worst: float, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    rates = {1e-3: 1.8, 1e-2: 1.5, 1e-1: worst}
    runs = [
        {"values": {"lora_r": r, "learning_rate": rate}, "evaluations": [{"step": 3, "loss": loss}]}
        for r in (4, 16)
        for rate, loss in rates.items()
    ]
    grid = {"lora_r": [4, 16], "learning_rate": list(rates)}
    module.picture(Path("x.png"), {"grid": grid, "options": {"task": "sft"}, "base": 2.0, "runs": runs})
    (axes,) = figures[0].axes
    bottom, top = axes.get_ylim()
    assert bottom < 1.5 and (top < worst) == cut and top > 2.0
    assert axes.get_legend_handles_labels()[1] == ["lora_r=4", "lora_r=16", "base"]
