"""One training run on a tiny model: it learns, it is repeatable, it resumes on the same curve."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import TRAINING, assert_close
from tests.unit.training.tiny import RECORDS, tiny_model, tiny_tokenizer
from veneer import ConfigError, LoraConfig, PeftModel, TrainingError, get_peft_model
from veneer.training import TrainOptions, encode, loop, train

TOKENIZER = tiny_tokenizer()
ROWS = encode(RECORDS, TOKENIZER).rows


class Listening:
    """Remembers what was reported."""

    def __init__(self) -> None:
        self.total, self.notes = 0, []

    def say(self, line: str) -> None:
        self.notes.append(line)

    @contextmanager
    def bar(self, title: str, total: int) -> Any:
        self.total = total
        yield lambda steps, note: self.notes.append((steps, note))


def adapted(dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    return get_peft_model(
        tiny_model(),
        LoraConfig(
            r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def run(output: Path, dropout: float = 0.0, **options: Any) -> list[float]:
    settings = {"learning_rate": 1e-2, "batch_size": 4, **options}
    metrics = train(adapted(dropout), TOKENIZER, ROWS, output, TrainOptions(**settings))
    return [entry["loss"] for entry in metrics["losses"]]


def test_the_loss_falls_and_the_base_stays(tmp_path: Path) -> None:
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    metrics = train(
        model, TOKENIZER, ROWS, tmp_path, TrainOptions(learning_rate=1e-2, epochs=8, batch_size=4)
    )
    losses = [entry["loss"] for entry in metrics["losses"]]
    assert len(losses) == metrics["steps"] == 32
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert metrics["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_what_it_leaves_on_disk(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "metrics.json", "tokenizer.json"} <= names
    assert not {name for name in names if name.startswith(("checkpoint", "model", ".", "runs"))}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["losses"]] == [1, 2, 3]
    assert metrics["options"]["max_steps"] == 3
    assert metrics["tokens"] > 0
    PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_the_same_seed_gives_the_same_losses(tmp_path: Path) -> None:
    first, again, other = (
        run(tmp_path / name, dropout=0.1, max_steps=5, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


def test_resume_continues_the_same_curve(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", dropout=0.1, max_steps=8)
    run(tmp_path / "cut", dropout=0.1, max_steps=8, save_steps=4)
    (checkpoint,) = (p for p in (tmp_path / "cut").glob("checkpoint-*") if p.name != "checkpoint-8")
    names = {path.name for path in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    for path in (tmp_path / "cut" / "checkpoint-8").iterdir():
        path.unlink()
    (tmp_path / "cut" / "checkpoint-8").rmdir()
    resumed = run(tmp_path / "cut", dropout=0.1, max_steps=8, save_steps=4, resume=True)
    assert resumed == whole


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    large = run(tmp_path / "a", batch_size=8, max_steps=3)
    small = run(tmp_path / "b", batch_size=2, gradient_accumulation_steps=4, max_steps=3)
    assert_close(torch.tensor(large), torch.tensor(small), TRAINING)


def test_it_reports_each_step(tmp_path: Path) -> None:
    listening = Listening()
    train(adapted(), TOKENIZER, ROWS, tmp_path, TrainOptions(max_steps=3), listening)
    assert listening.total == 3
    steps = [note for note in listening.notes if note[0]]
    assert len(steps) == 3 and all(note.startswith("loss ") for _, note in steps)


def test_nothing_goes_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, max_steps=2)
    assert capsys.readouterr().out == ""


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path)
    with pytest.raises(TrainingError, match="is_trainable=True"):
        train(frozen, TOKENIZER, ROWS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        run(tmp_path / "empty", resume=True, max_steps=2)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(math.inf)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(model, TOKENIZER, ROWS, tmp_path, TrainOptions(max_steps=2))
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_wrong_options_are_named_together() -> None:
    with pytest.raises(
        ConfigError, match=r"learning_rate must be above 0, not -1; batch_size must be above 0"
    ):
        TrainOptions(learning_rate=-1, batch_size=0)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    for number, state in ((2, "{}"), (10, "{}"), (12, '{"cut'), (14, None)):
        place = tmp_path / f"checkpoint-{number}"
        place.mkdir()
        if state is not None:
            (place / "trainer_state.json").write_text(state)
    assert loop._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    with pytest.raises(TrainingError, match="--save-steps"):
        loop._last_checkpoint(tmp_path / "none")
