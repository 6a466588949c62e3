"""`veneer train`: what it writes, on which stream it speaks, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.words import train_words
from tests.unit.conftest import shared
from tests.unit.training.tiny import saved_records
from veneer.cli import main
from veneer.training.options import RunOptions, read_yaml

STEADY = ["--lr-scheduler-type", "constant", "--lora-dropout", "0.1", "--max-steps", "5"]
PAIRS = [f'{{"prompt": "{n}", "chosen": "a", "rejected": "b"}}' for n in range(4)]


def metrics_of(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module", params=["sft", "dpo"])
def finished(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The output of a run of five steps, with its checkpoints; its data and its method are beside it."""
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "sft":
        saved_records(place / "data.jsonl")
    else:
        (place / "data.jsonl").write_text("".join(f"{line}\n" for line in PAIRS * 2))
    assert main(finished_words(base, place, place / "out")) == 0
    with shared(place):
        yield place / "out"


def finished_words(base: Path, place: Path, output: Path) -> list[str]:
    method = "sft" if "completion" in (place / "data.jsonl").read_text() else "dpo"
    more = ["--json", "--method", method, "--save-steps", "2", *STEADY]
    return train_words(base, place / "data.jsonl", output, *more)


def test_train_writes_the_adapter(adapter: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "loss.png"} <= names
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 16
    assert len(metrics_of(adapter)["losses"]) == 4


def test_train_speaks_on_the_right_streams(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = saved_records(tmp_path / "data.jsonl")
    assert main(train_words(base, data, tmp_path / "a", "--json", "--target-modules", "q_proj,v_proj")) == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out)
    assert metrics["steps"] == 4
    assert "16 examples" in captured.err and "training 4/4" in captured.err
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_train_resumes(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, whole = saved_records(tmp_path / "data.jsonl"), metrics_of(adapter)["losses"]
    assert main(train_words(base, data, tmp_path / "cut", "--save-steps", "3")) == 0
    capsys.readouterr()
    for path in (tmp_path / "cut").glob("checkpoint-4/*"):
        path.unlink()
    (tmp_path / "cut" / "checkpoint-4").rmdir()
    assert main(train_words(base, data, tmp_path / "cut", "--resume", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["losses"] == whole


def test_train_sets_examples_aside(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = saved_records(tmp_path / "data.jsonl"), tmp_path / "out"
    words = train_words(
        base, data, out, "--json", "--validation-split", "0.2", "--packing", "--save-steps", "2"
    )
    assert main(words) == 0
    captured = capsys.readouterr()
    whole = json.loads(captured.out)
    assert "3 of them are set aside for validation, drawn by the seed 0" in captured.err
    assert "13 examples packed" in captured.err
    assert [entry["step"] for entry in whole["evaluations"]] == [0, 4]
    shutil.rmtree(out / "checkpoint-4")
    (out / "veneer_run.json").unlink()
    assert main([*words, "--resume"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["losses"] == whole["losses"] and resumed["evaluations"] == whole["evaluations"]
    (out / "veneer_run.json").unlink()
    assert main([*words, "--resume", "--validation-split", "0.3"]) == 1
    assert "--validation-split was 0.2 and is 0.3" in capsys.readouterr().err
    assert main([*words, "--validation-split", "0.2", "--eval-data", str(data)]) == 2
    assert "--validation-split and --eval-data both say what to validate on" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["all", "no picture", "no result", "no last checkpoint"])
def test_a_finished_run_is_resumed_without_training(
    left: str, finished: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    adapter = (out / "adapter_model.safetensors").read_bytes()
    lost = {"all": [], "no picture": ["loss.png"]}.get(left, ["metrics.json", "adapter_model.safetensors"])
    for name in [*lost, *(["veneer_run.json"] if len(lost) > 1 else [])]:
        (out / name).unlink()
    if left == "no last checkpoint":
        shutil.rmtree(out / "checkpoint-5")
    assert main([*finished_words(base, finished.parent, out), "--resume"]) == 0
    captured = capsys.readouterr()
    resumed = json.loads(captured.out)
    assert resumed["losses"] == metrics_of(finished)["losses"] and resumed["steps"] == 5
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    assert (out / "loss.png").is_file() and (out / "metrics.json").is_file()
    assert ("nothing is left to train" in captured.err) == (left != "no last checkpoint")
    assert ("training 5/5" in captured.err) == (left == "no last checkpoint")


def test_an_adapter_that_is_trained_further_keeps_its_configuration(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = saved_records(tmp_path / "data.jsonl")
    words = ["train", "--resume-from-adapter", str(adapter), "--data", str(data), "--max-steps", "2"]
    more = ["--output", str(tmp_path / "out")]
    agreeing = ["--lora-r", "4", "--lora-target-modules", "all-linear", "--lora-alpha", "16"]
    assert main([*words, *more, *agreeing, "--json"]) == 0
    captured = capsys.readouterr()
    assert f"Continuing to train the adapter {adapter}" in captured.err
    options = json.loads(captured.out)["options"]
    assert (options["lora_r"], options["model"]) == (4, str(base))
    file = tmp_path / "run.yaml"
    file.write_text("lora_r: 16\ninit_lora_weights: pissa\n")  # 16 is the default, but it was given
    contrary = ["--lora-target-modules", "q_proj", "--use-dora", "--task", "seq-cls"]
    assert main([*words, str(file), "--output", str(tmp_path / "other"), *contrary]) == 2
    said = capsys.readouterr().err
    assert "--task seq-cls (the adapter has causal-lm), --lora-r 16 (the adapter has 4)" in said
    for name in ("--lora-target-modules q_proj (", "--use-dora (", "--init-lora-weights pissa ("):
        assert name in said
    assert "alpha" not in said and not (tmp_path / "other").exists()
    for place in (adapter, adapter.parent):
        assert main([*words, "--output", str(place)]) == 2
        assert "contains the adapter that is trained further" in capsys.readouterr().err


def test_train_says_what_was_cut(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "' + "a" * 90 + '", "completion": "b"}\n')
    assert main(train_words(base, data, tmp_path / "a", "--max-length", "30")) == 0
    assert "longer than 30 tokens" in capsys.readouterr().err


def test_train_renames_columns(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"
    rows = [{"question": f"Double {n}.", "answer": 2 * n} for n in range(8)]
    data.write_text(json.dumps({"data": rows}))
    words = train_words(base, data, tmp_path / "out", "--max-steps", "1", "--eval-data", str(data))
    assert main(words) == 1
    assert ". --columns renames columns" in capsys.readouterr().err
    assert main([*words, "--columns", "prompt=question,completion=answer"]) == 0
    assert capsys.readouterr().err.count(f"8 records from {data}: columns prompt + completion") == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("nonsense\n", "line 1: it is no JSON"),
        ('{"promt": "a", "completion": "b"}\n', "'prompt'"),
    ],
)
def test_train_refuses_bad_data_before_anything_is_written(
    content: str | None, said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    assert main(train_words(base, data, tmp_path / "out")) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and said in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target-modules", "q_porj"], "q_proj"),
        (["--resume"], "contains no checkpoint"),
    ],
    ids=" ".join,
)
def test_train_refuses_bad_settings(
    more: list[str], said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_words(base, saved_records(tmp_path / "data.jsonl"), tmp_path / "out", *more)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "error: " in error and said in error and "bug" not in error


def test_train_refuses_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = saved_records(tmp_path / "data.jsonl")
    assert main(train_words(tmp_path / "nothing", data, tmp_path / "out")) == 1
    assert "no model at" in capsys.readouterr().err


def test_train_takes_a_yaml_file_and_flags_override_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    data = saved_records(tmp_path / "data.jsonl")
    config.write_text(f"model: {base}\ndata: {data}\noutput: {tmp_path / 'out'}\nlora-r: 2\nmax_steps: 2\n")
    assert main(["train", str(config), "--max-steps", "1", "--json"]) == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out)
    assert metrics["steps"] == 1 and metrics["options"]["lora_r"] == 2
    assert captured.err.index("Estimate: 1 steps") < captured.err.index("training 1/1")
    config.write_text("lora_rank: 2\nlerning_rate: 1\n")
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert "lora_rank" in said and "lerning_rate" in said and "learning" in said


@pytest.mark.parametrize(
    ("how", "lines", "measure"),
    [
        (["--task", "seq-cls"], ['{"text": "a", "label": "x"}', '{"text": "b", "label": "y"}'], "accuracy"),
        (["--method", "dpo"], PAIRS, "rewards/margins"),
        (["--method", "orpo"], PAIRS, "rewards/margins"),
        (["--method", "reward"], PAIRS, "accuracy"),
        (
            ["--method", "kto"],
            [f'{{"prompt": "{n}", "completion": "{"ab"[n % 2]}", "label": {n % 2}}}' for n in range(4)],
            "rewards/margins",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, list) and len(value) == 2 else "",
)
def test_train_classes_and_preferences(
    how: list[str], lines: list[str], measure: str, base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    words = train_words(base, data, tmp_path / "out", "--eval-data", str(data), *how)
    assert main(words) == 0
    metrics = metrics_of(tmp_path / "out")
    first, last = metrics["evaluations"][0], metrics["evaluations"][-1]
    assert last["loss"] < first["loss"] and measure in last
    assert not [place for place in (tmp_path / "out").iterdir() if place.is_dir()]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"] == "SEQ_CLS") == (how[1] in ("seq-cls", "reward"))


def test_the_template_of_a_configuration_trains(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--print-config"]) == 0
    template = capsys.readouterr().out
    options = RunOptions(model="a", data="b", output="c")
    assert all(f"\n{name}: " in template for name in vars(options))
    comments = [line for line in template.splitlines() if line.startswith("# ")]
    assert len(comments) >= len(vars(options)) and max(map(len, template.splitlines())) <= 100
    file = tmp_path / "run.yaml"
    file.write_text(template)
    assert main(["train", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == template
    words = train_words(base, saved_records(tmp_path / "data.jsonl"), tmp_path / "out", "--max-steps", "1")
    assert main([*words, str(file)]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_all_options_are_printed_as_they_would_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nlora_r: 5\nlora_modules_to_save: [head, norm]\n")
    assert main(["train", str(file), "--print-config", "--lora-r", "6", "--use-dora"]) == 0
    file.write_text(capsys.readouterr().out)
    want = {"model": "m", "data": "d", "output": "o", "lora_r": 6, "use_dora": True}
    assert RunOptions(**read_yaml(file)) == RunOptions(**want, lora_modules_to_save="head,norm")


def test_a_configuration_that_lacks_something_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-config", "--model", "m"]) == 2
    assert "--data is missing" in capsys.readouterr().err
