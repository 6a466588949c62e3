"""Training a tiny model: it learns, it is repeatable, it resumes on the same curve."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tolerances import TRAINING, assert_close
from tests.unit.training.tiny import RECORDS, tiny_model, tiny_tokenizer
from veneer import ConfigError, LoraConfig, MissingExtraError, PeftModel, TrainingError, get_peft_model
from veneer.files.read import open_adapter
from veneer.training import Collator, RunOptions, TrainOptions, encode, train
from veneer.training.losses import loss_sum
from veneer.training.plots import loss_picture, said_if_not_written
from veneer.training.run import fine_tune
from veneer.training.stopping import Interrupted, Stop

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
    return losses_of(whole_run(output, dropout, **options))


def whole_run(output: Path, dropout: float = 0.0, **options: Any) -> dict[str, Any]:
    rest = {name: options.pop(name) for name in ("eval_rows", "stop", "callbacks") if name in options}
    progress = options.pop("progress", None)
    settings = {"learning_rate": 1e-2, "batch_size": 4, **options}
    return train(adapted(dropout), TOKENIZER, ROWS, output, TrainOptions(**settings), progress, **rest)


def metrics_of(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "metrics.json").read_text())
    return found


def losses_of(metrics: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in metrics["losses"]]


class StopAfter(Stop):
    """Asks to stop when it was asked a number of times: once a step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left <= 0


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
    returned = whole_run(tmp_path, max_steps=3)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "metrics.json", "tokenizer.json"} <= names
    assert not {name for name in names if name.startswith(("checkpoint", "model", ".", "runs"))}
    metrics = metrics_of(tmp_path)
    assert [entry["step"] for entry in metrics["losses"]] == [1, 2, 3] and metrics == returned
    assert metrics["options"]["max_steps"] == 3
    assert metrics["tokens"] > 0
    PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_the_same_seed_gives_the_same_losses(tmp_path: Path) -> None:
    first, again, other = (
        run(tmp_path / name, dropout=0.1, max_steps=3, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


def test_resume_continues_the_same_curve(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", dropout=0.1, max_steps=5)
    run(tmp_path / "cut", dropout=0.1, max_steps=5, save_steps=3)
    (checkpoint,) = (p for p in (tmp_path / "cut").glob("checkpoint-*") if p.name != "checkpoint-5")
    names = {path.name for path in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    for path in (tmp_path / "cut" / "checkpoint-5").iterdir():
        path.unlink()
    (tmp_path / "cut" / "checkpoint-5").rmdir()
    resumed = run(tmp_path / "cut", dropout=0.1, max_steps=5, save_steps=3, resume=True)
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
    with pytest.raises(TrainingError, match="contains no checkpoint"):
        run(tmp_path / "empty", resume=True, max_steps=2)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(math.inf)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(model, TOKENIZER, ROWS, tmp_path, TrainOptions(max_steps=2))
    assert not (tmp_path / "adapter_model.safetensors").exists()


LONG = {"epochs": 3.5, "batch_size": 3, "gradient_accumulation_steps": 2}
LONG |= {"dropout": 0.2, "eval_rows": ROWS[:5], "eval_steps": 2}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("long")
    whole = whole_run(place, **LONG)
    assert whole["steps"] == 11
    assert [entry["step"] for entry in whole["evaluations"]] == [0, 2, 4, 6, 8, 10, 11]
    return place


@pytest.mark.parametrize("steps", [1, 3, 4, 7])  # an epoch has three steps
def test_stopped_and_resumed_it_has_the_losses_of_one_run(steps: int, long: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as left:
        whole_run(tmp_path / "cut", stop=StopAfter(steps), **LONG)
    assert (left.value.step, left.value.steps) == (steps, 11)
    assert left.value.checkpoint == tmp_path / "cut" / f"checkpoint-{steps}"
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    resumed, whole = whole_run(tmp_path / "cut", resume=True, **LONG), metrics_of(long)
    assert resumed["losses"] == whole["losses"]
    assert resumed["evaluations"] == whole["evaluations"]
    assert resumed["tokens"] == whole["tokens"]
    same = (place / "adapter_model.safetensors" for place in (long, tmp_path / "cut"))
    assert len({file.read_bytes() for file in same}) == 1


def test_checkpoints_that_nobody_asked_for_are_removed_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        whole_run(tmp_path, max_steps=4, stop=StopAfter(2))
    run(tmp_path, max_steps=4, resume=True)
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(TrainingError, match="no checkpoint; the run that it holds went to its end"):
        run(tmp_path, max_steps=6, resume=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with its checkpoints."""
    place = tmp_path_factory.mktemp("saved")
    run(place, max_steps=6, save_steps=4)
    return place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01 and is 0.02"),
        ({"seed": 3, "max_steps": 9}, "max_steps was 6 and is 9; seed was 0 and is 3"),
        ({"dropout": 0.3}, "another lora_dropout"),
        ({"eval_rows": ROWS[:2]}, "the evaluation data have other rows"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_another_run_is_not_resumed(change: dict[str, Any], said: str, saved: Path) -> None:
    before = everything(saved)
    with pytest.raises(TrainingError, match="belongs to another run") as refused:
        run(saved, **{"max_steps": 6, "resume": True, **change})
    assert said in str(refused.value)
    assert before == everything(saved)


def test_other_data_are_not_resumed(tmp_path: Path) -> None:
    options = TrainOptions(max_steps=4, save_steps=2)
    train(adapted(), TOKENIZER, ROWS, tmp_path, options)
    with pytest.raises(TrainingError, match="the data have other rows"):
        train(adapted(), TOKENIZER, ROWS[::-1], tmp_path, TrainOptions(max_steps=4, resume=True))


def test_a_new_run_does_not_mix_with_old_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4, save_steps=2)
    with pytest.raises(TrainingError, match=r"checkpoint-2, checkpoint-4.*overwrite_output_dir"):
        run(tmp_path, max_steps=4)
    run(tmp_path, max_steps=3, save_steps=3, overwrite_output_dir=True)
    assert [place.name for place in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_that_cannot_be_written_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"checkpoint-2 cannot be written: No space left on device"):
        run(tmp_path / "out", max_steps=4, save_steps=2)
    assert not list((tmp_path / "out").rglob("*"))


def test_a_checkpoint_whose_directory_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.makedirs

    def full(name: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-2" in str(name):
            raise OSError(28, "No space left on device", str(name))
        make(name, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", full)
    with pytest.raises(TrainingError, match=r"checkpoint-2 cannot be written: No space.*after step 2"):
        run(tmp_path / "out", max_steps=4, save_steps=2)


def test_rows_that_nothing_can_be_learned_or_measured_on(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no rows to train on"):
        train(adapted(), TOKENIZER, [], tmp_path / "out")
    blank = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:2]]
    with pytest.raises(TrainingError, match="no held-out row has a label"):
        train(adapted(), TOKENIZER, ROWS, tmp_path / "out", TrainOptions(max_steps=1), eval_rows=blank)
    assert not (tmp_path / "out").exists()


def test_a_result_that_cannot_be_written_is_said_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", full)
    with pytest.raises(
        TrainingError, match=r"cannot be written .*: No space left .*the adapter alone is wri"
    ):
        run(tmp_path / "out", max_steps=1)
    open_adapter(tmp_path / "out")
    with pytest.raises(TrainingError, match=r"this is mended, resume.* continues from .*checkpoint-2"):
        run(tmp_path / "kept", max_steps=2, save_steps=1)


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    progress = Listening()
    with said_if_not_written(progress):
        loss_picture(tmp_path / "none" / "loss.png", [1.0], "Training loss")
    (line,) = progress.notes
    assert line.startswith("warning: no picture: ") and "No such file" in line


def test_a_full_disk_leaves_no_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"the result cannot be written .* learned is lost"):
        run(tmp_path / "deep" / "out", max_steps=1)
    with pytest.raises(TrainingError, match=r"checkpoint-1 cannot be written: .*No space left"):
        run(tmp_path / "deep" / "out", max_steps=1, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", full)
        with pytest.raises(TrainingError, match=r"an earlier run left in .*out cannot be removed: No space"):
            run(tmp_path / "deep" / "out", max_steps=1)
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(TrainingError, match=r"the directory .*out cannot be made: No space left"):
        run(tmp_path / "deep" / "out", max_steps=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optim": "adamw_torhc"}, r"optim 'adamw_torhc' .*transformers \(did you mean 'adamw_torch'\?\)"),
        ({"optim": "zzz"}, "optim 'zzz' is unknown to transformers; it knows adamw_torch, "),
        ({"report_to": "nothing_like_it"}, "report_to: nothing_like_it is not installed or unknown"),
    ],
)
def test_what_transformers_does_not_know_is_refused_before_anything_is_made(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_optimizer_whose_library_is_missing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(
        MissingExtraError, match=r"the optimizer adamw_8bit needs bitsandbytes.*veneer\[quant"
    ):
        run(tmp_path / "out", optim="adamw_8bit")
    assert not (tmp_path / "out").exists()


class Bounded(nn.Module):
    """A model of transformers that bounds the logits, as Gemma 2 does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        made = self.model(**inputs)
        made.logits = 30.0 * torch.tanh(made.logits / 30.0)
        return made


def test_a_loss_in_chunks_is_refused_where_the_head_does_not_make_the_logits(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    options = TrainOptions(loss_chunk_size=5, max_steps=1)
    for base, says in (
        (Bounded(tiny_model()), "Bounded changes the logits after its head.*loss_chunk_size"),
        (tiny_model().model, "LlamaModel has no head that turns hidden states into logits.*loss_chunk_size"),
    ):
        with pytest.raises(TrainingError, match=says):
            train(get_peft_model(base, config), TOKENIZER, ROWS, tmp_path / "out", options)


def test_evaluation_leaves_the_losses_alone(tmp_path: Path) -> None:
    plain = whole_run(tmp_path / "a", dropout=0.1, max_steps=5)
    watched = whole_run(tmp_path / "b", dropout=0.1, max_steps=5, eval_rows=ROWS, eval_steps=1)
    assert plain["losses"] == watched["losses"]
    assert plain["evaluations"] == []
    assert [entry["step"] for entry in watched["evaluations"]] == [0, 1, 2, 3, 4, 5]
    assert watched["evaluations"][-1]["loss"] < watched["evaluations"][0]["loss"]


def test_warmup_as_a_share_of_all_steps(tmp_path: Path) -> None:
    share = whole_run(tmp_path / "a", epochs=2, warmup_ratio=0.5)
    steps = whole_run(tmp_path / "b", epochs=2, warmup_steps=4)
    assert share["losses"] == steps["losses"]
    rates = [entry["learning_rate"] for entry in share["losses"]]
    assert rates.index(max(rates)) == 4


def test_ways_to_save_memory_change_no_loss(tmp_path: Path) -> None:
    plain = run(tmp_path / "a", max_steps=4)
    for name in ("loss_chunk_size", "gradient_checkpointing"):
        sparing = run(tmp_path / name, max_steps=4, **{name: 5 if name == "loss_chunk_size" else True})
        assert_close(torch.tensor(plain), torch.tensor(sparing), TRAINING)


def everything(place: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in place.rglob("*") if p.is_file()}


#: The rate is not at zero in the end: a step too many would change the adapter. An epoch has four steps.
STEADY = {"lr_scheduler_type": "constant", "dropout": 0.1}


@pytest.fixture(scope="module")
def finish(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, dict[str, Any]], dict[str, Any]]:
    """Puts a finished run into a directory, and gives its metrics; each kind of run is made once."""
    made: dict[str, Path] = {}

    def put(place: Path, how: dict[str, Any]) -> dict[str, Any]:
        if str(how) not in made:
            made[str(how)] = tmp_path_factory.mktemp("finished")
            whole_run(made[str(how)], **how)
        shutil.copytree(made[str(how)], place, dirs_exist_ok=True)
        return metrics_of(place)

    return put


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"epochs": 1.5}, {"epochs": 2}], ids=str)
@pytest.mark.parametrize("save_steps", [0, 3])
def test_a_finished_run_is_not_trained_again(
    length: dict[str, Any],
    save_steps: int,
    finish: Callable[[Path, dict[str, Any]], dict[str, Any]],
    tmp_path: Path,
) -> None:
    how = {**STEADY, **length, "save_steps": save_steps, "eval_rows": ROWS[:3]}
    first = finish(tmp_path, how)
    before = everything(tmp_path)
    listening = Listening()
    again = whole_run(tmp_path, resume=True, progress=listening, **how)
    assert again == first
    assert everything(tmp_path) == before
    assert ["finished" in note for note in listening.notes] == [True]


@pytest.mark.parametrize("lost", [["adapter_model.safetensors"], ["metrics.json"], ["veneer_run.json"]])
@pytest.mark.parametrize("length", [{"max_steps": 6}, {"epochs": 2}], ids=str)
def test_what_a_finished_run_lacks_is_written(
    lost: list[str],
    length: dict[str, Any],
    finish: Callable[[Path, dict[str, Any]], dict[str, Any]],
    tmp_path: Path,
) -> None:
    how = {**STEADY, **length, "save_steps": 3, "eval_rows": ROWS[:3]}
    first = finish(tmp_path, how)
    before = everything(tmp_path)
    for name in lost:
        (tmp_path / name).unlink()
    listening = Listening()
    again = whole_run(tmp_path, resume=True, progress=listening, **how)
    timeless = {name: value for name, value in first.items() if name not in ("seconds", "options")}
    assert {name: again[name] for name in timeless} == timeless
    assert listening.total == 0 and "reached its last step" in listening.notes[0]
    assert everything(tmp_path).keys() == before.keys()
    weights = tmp_path / "adapter_model.safetensors"
    assert weights.read_bytes() == before[weights][0]


def test_more_steps_are_gone_on_to(tmp_path: Path) -> None:
    """With a schedule that does not depend on the length, the longer run is the one of that length."""
    whole = whole_run(tmp_path / "whole", max_steps=7, **STEADY)
    whole_run(tmp_path / "cut", max_steps=5, save_steps=5, **STEADY)
    longer = whole_run(tmp_path / "cut", max_steps=7, resume=True, **STEADY)
    assert longer["losses"] == whole["losses"] and longer["steps"] == 7
    same = (tmp_path / place / "adapter_model.safetensors" for place in ("whole", "cut"))
    assert len({file.read_bytes() for file in same}) == 1


def test_more_epochs_follow_the_schedule_of_the_longer_run(tmp_path: Path) -> None:
    whole = whole_run(tmp_path / "whole", epochs=2)
    whole_run(tmp_path / "cut", epochs=1, save_steps=4)
    listening = Listening()
    longer = whole_run(tmp_path / "cut", epochs=2, resume=True, progress=listening)
    assert [entry["learning_rate"] for entry in longer["losses"][4:]] == [
        entry["learning_rate"] for entry in whole["losses"][4:]
    ]
    assert "was planned with 4 steps and now has 8" in listening.notes[0] and "linear" in listening.notes[0]


def test_a_run_that_its_trainer_ended_early_is_finished(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Early(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 3
            return control

    first = whole_run(tmp_path, max_steps=6, save_steps=2, callbacks=[Early()])
    assert first["steps"] == 3
    before = everything(tmp_path)
    assert whole_run(tmp_path, max_steps=6, save_steps=2, resume=True, callbacks=[Early()]) == first
    assert everything(tmp_path) == before


def test_asked_to_stop_in_an_evaluation_it_does_one_more_step(tmp_path: Path) -> None:
    """The evaluation in hand is finished; after the last one nothing is left to stop."""
    stop = Stop()

    class Asking(Listening):
        def say(self, line: str) -> None:
            stop.asked = stop.asked or "held-out" in line

    how = {"max_steps": 3, "eval_rows": ROWS[:5], **STEADY}
    whole = whole_run(tmp_path / "whole", **how)
    with pytest.raises(Interrupted) as left:
        whole_run(tmp_path / "cut", stop=stop, progress=Asking(), **how)
    assert (left.value.step, left.value.steps) == (1, 3)
    stop.asked = False
    resumed = whole_run(tmp_path / "cut", resume=True, stop=stop, progress=Asking(), **how)
    assert stop.asked and resumed["losses"] == whole["losses"]
    assert resumed["evaluations"] == whole["evaluations"] and len(resumed["evaluations"]) == 2


def test_how_often_checkpoints_are_written_may_change(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4, save_steps=4)
    run(tmp_path, max_steps=8, save_steps=3, save_total_limit=9, resume=True)
    steps = sorted(int(place.name.partition("-")[2]) for place in tmp_path.glob("checkpoint-*"))
    assert steps == [4, 6, 8]


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, max_steps=5, save_steps=1, save_total_limit=2)
    assert {place.name for place in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


def test_a_new_run_is_not_taken_for_the_finished_one_before_it(tmp_path: Path) -> None:
    how = {"max_steps": 4, **STEADY}
    whole = run(tmp_path, **how)
    with pytest.raises(Interrupted):
        whole_run(tmp_path, stop=StopAfter(2), **how)
    listening = Listening()
    assert losses_of(whole_run(tmp_path, resume=True, progress=listening, **how)) == whole
    assert len([note for note in listening.notes if note[0] == 1]) == 2


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed.*--use_fsdp --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP2 is supported: accelerate launch"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "accelerate shards on GPUs only"),
    ],
    ids=["deepspeed", "fsdp1", "on-cpu"],
)
def test_what_a_launcher_asks_for_and_nobody_would_do_is_refused(
    variables: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = RunOptions(model="nowhere", data="nowhere", output=str(tmp_path / "out"))
    with pytest.raises(TrainingError, match=says):
        fine_tune(options)
    assert not (tmp_path / "out").exists()


def test_the_held_out_loss_is_a_mean_over_tokens(tmp_path: Path) -> None:
    """Rows without a loss fill up the last batch; they and the sizes of batches change nothing."""
    model = adapted().eval()
    rows = encode([{"prompt": "a" * n, "completion": "b" * n} for n in (1, 9, 2, 7, 3)], TOKENIZER).rows
    batches = [Collator(0)([row]) for row in rows]
    parts = [loss_sum(model, batch) for batch in batches]
    expected = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    for size in (1, 3, 8):
        how = {"max_steps": 1, "learning_rate": 1e-30, "batch_size": size}
        options = TrainOptions(**how)
        found = train(adapted(), TOKENIZER, ROWS, tmp_path / str(size), options, eval_rows=rows)
        assert_close(torch.tensor(found["evaluations"][0]["loss"]), expected.detach())
