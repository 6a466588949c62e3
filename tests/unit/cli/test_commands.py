"""Each command on a tiny model, in-process; what it prints, writes and refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.tiny import saved_records, saved_tiny
from veneer.cli import main
from veneer.training import demo


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    assert main(train_words(base, saved_records(place / "data.jsonl"), place / "adapter")) == 0
    return place / "adapter"


def train_words(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    files = ["--model", str(base), "--data", str(data), "--output", str(output)]
    how = "--max-steps 4 --batch-size 4 --learning-rate 0.01 --lora-r 4".split()
    return ["train", *files, *how, *more]


def test_train_writes_the_adapter(adapter: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "loss.png"} <= names
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 16
    assert len(json.loads((adapter / "metrics.json").read_text())["losses"]) == 4


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


def test_train_resumes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = saved_records(tmp_path / "data.jsonl")
    assert main(train_words(base, data, tmp_path / "whole", "--json")) == 0
    whole = json.loads(capsys.readouterr().out)["losses"]
    assert main(train_words(base, data, tmp_path / "cut", "--save-steps", "3")) == 0
    capsys.readouterr()
    for path in (tmp_path / "cut").glob("checkpoint-4/*"):
        path.unlink()
    (tmp_path / "cut" / "checkpoint-4").rmdir()
    assert main(train_words(base, data, tmp_path / "cut", "--resume", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["losses"] == whole


def test_train_says_what_was_cut(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "' + "a" * 90 + '", "completion": "b"}\n')
    assert main(train_words(base, data, tmp_path / "a", "--max-length", "30")) == 0
    assert "1 examples are longer than 30 tokens and were cut; 1 of them lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("nonsense\n", "line 1 is no JSON"),
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
        (["--lora-r", "0"], "r"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--target-modules", "q_porj"], "q_proj"),
        (["--resume"], "holds no checkpoint"),
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


def test_generate(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(adapter), "--max-new-tokens", "5"]
    assert main([*words, "Double 11."]) == 0
    answer = capsys.readouterr()
    assert answer.err == ""
    assert main([*words, "Double 11.", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "Double 11.", "answer": answer.out[:-1]}
    monkeypatch.setattr(sys, "stdin", io.StringIO("Double 11.\n"))
    assert main(words) == 0
    assert capsys.readouterr().out == answer.out
    assert main([*words, "Double 11.", "--base"]) == 0
    assert capsys.readouterr().out != answer.out


def test_merge(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["Double 11.", "--max-new-tokens", "5", "--json"]
    assert main(["generate", str(adapter), *question]) == 0
    expected = json.loads(capsys.readouterr().out)["answer"]
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["kept"]["modules"]) == 14 and report["kept"]["worst"] > 0.999
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names
    # Where neither library can be imported.
    code = (
        "import sys; sys.modules['veneer'] = sys.modules['peft'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"place = {str(tmp_path / 'merged')!r}\n"
        "tokenizer = AutoTokenizer.from_pretrained(place)\n"
        "model = AutoModelForCausalLM.from_pretrained(place)\n"
        "chat = [{'role': 'user', 'content': 'Double 11.'}]\n"
        "text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)\n"
        "ids = tokenizer(text, return_tensors='pt')['input_ids']\n"
        "out = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1]:]\n"
        "print(tokenizer.decode(out, skip_special_tokens=True), end='')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_merge_in_words(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter), "--output", str(tmp_path), "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "14 modules merged; 100.0% of the update kept" in out and str(tmp_path) in out


def test_inspect(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "rank        4\n" in out and "scaling     4\n" in out and "down_proj" in out and "4 × 48" in out
    assert main(["inspect", str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == 14 and found["scalings"] == [4.0]


@pytest.mark.parametrize("command", [["inspect"], ["generate"], ["merge", "--output", "out"]], ids=" ".join)
def test_broken_adapters_are_refused(
    command: list[str],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["hello"] if command == ["generate"] else []
    broken = tmp_path / "broken"
    broken.mkdir()

    def refused(place: str) -> str:
        assert main([*command, place, *more]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ")
        assert "Traceback" not in captured.err and "bug" not in captured.err
        return captured.err

    assert "nowhere" in refused("nowhere")
    assert "adapter_config.json" in refused("broken")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / name).write_bytes((adapter / name).read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    assert "adapter_model.safetensors" in refused("broken")
    (broken / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused("broken")
    assert not (tmp_path / "out").exists()


def result(passed: bool) -> Any:
    score = demo.Score(40, 48, 0.05, ["{}"] * 48)
    return demo.DemoResult(
        mails=demo.mails()["heldout"],
        before=demo.Score(0, 0, 0.6, ["before"] * 48),
        after=score,
        reloaded=score,
        unmerged=score,
        merged=score,
        kept=1.0,
        kept_in_16_bits=0.45,
        trainable=100,
        parameters=10_000,
        sizes={"adapter": 20_000_000, "base": 269_000_000, "merged": 538_000_000},
        places={"adapter": "somewhere/adapter"},
        seconds={"training": 60.0},
        bars=[demo.Bar("valid JSON", "at least 90 %", "48/48", passed)],
    )


@pytest.mark.parametrize("passed", [True, False])
def test_demo_exits_1_unless_every_bar_is_reached(
    passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def fake(output: Path, seed: int, progress: Any) -> Any:
        asked.append((output, seed))
        return result(passed)

    monkeypatch.setattr(demo, "run_demo", fake)
    assert main(["demo", "--output", str(tmp_path), "--seed", "3"]) == (0 if passed else 1)
    assert asked == [(tmp_path, 3)]
    out = capsys.readouterr().out
    rows = ("exact match", "valid JSON", "held-out loss")
    for words in ("before", "after", "reloaded", *rows, "20 MB", "269 MB", "538 MB", "45.0%"):
        assert words in out
    assert ("Every bar was reached" in out) is passed
    assert ("NOT REACHED: valid JSON" in out) is not passed
