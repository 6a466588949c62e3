"""Exit codes, streams and messages of the command line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import VeneerError, VeneerWarning
from veneer.cli import main

TRAIN = ["train", "--model", "m", "--data", "d", "--output", "o"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "veneer", *words], capture_output=True, text=True)


def test_as_a_process(tmp_path: Path) -> None:
    version = run("--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout.startswith("veneer 0.")
    failed = run("inspect", str(tmp_path / "nowhere"))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    assert "\x1b" not in failed.stderr


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from veneer.cli import main; code = main(['--help'])\n"
        "heavy = {'transformers', 'accelerate', 'matplotlib', 'huggingface_hub', 'datasets'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)\n"
        "sys.exit(code or len(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("plan", "train", "generate", "merge", "inspect"))


def test_control_c_is_130() -> None:
    code = (
        "import os, signal, sys; from veneer.cli import common, ls\n"
        "ls.show_json = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(common.main(['ls', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 == 128 + signal.SIGINT
    assert done.stderr.strip() == "interrupted"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands" in capsys.readouterr().out


def test_help_breaks_lines_where_the_terminal_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    assert main(["merge", "--help"]) == 0
    assert "16-bit weights cannot hold a small update exactly: the share" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspekt", "x"], "inspect"),
        (["inspect"], "adapter"),
        (["inspect", "x", "--jsn"], "--json"),
        (["merge", "x"], "--output"),
        ([*TRAIN, "--learning-rat", "1"], "--learning-rate"),
        ([*TRAIN, "--lora-r", "many"], "lora-r"),
        ([*TRAIN, "--lora-r", "0"], "--lora-r must be"),
        ([*TRAIN, "--learning-rate", "-1"], "--learning-rate must be"),
        ([*TRAIN, "--dtype", "int4"], "bfloat16"),
        (["generate", "x", "hello", "--temperature", "-1"], "--temperature"),
        (["generate", "x", "hello", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "x", "hello", "--dtype", "int4"], "--dtype is one of"),
        (["chat", "x", "--device", "gpu"], "--device is auto, cpu, cuda"),
        (["eval", "x", "--data", "y", "--quantize", "int3"], "--quantize is one of auto, none, nf4"),
        (["generate", "x", ""], "empty"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_names_the_word(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and said in captured.err
    assert "--help" in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "0") for name in ("epochs", "max_steps", "batch_size", "gradient_accumulation_steps")),
        *((name, "0") for name in ("logging_steps", "save_total_limit", "max_length", "beta", "lora_alpha")),
        *((name, "-1") for name in ("warmup_steps", "weight_decay", "max_grad_norm", "loss_chunk_size")),
        *((name, "-1") for name in ("eval_steps", "save_steps", "learning_rate", "lora_r", "warmup_ratio")),
        *((name, "odd") for name in ("lr_scheduler_type", "method", "task", "init_lora_weights", "dtype")),
        ("quantize", "odd"),
        ("lora_dropout", "2"),
        ("lora_target_modules", "["),
        ("lora_modules_to_save", ","),
        ("lora_target_parameters", ","),
    ],
    ids=lambda value: value,
)
def test_a_value_that_cannot_be_right_is_refused_by_its_flag(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--{name.replace('_', '-')}"
    assert main([*TRAIN, flag, value]) == 2
    error = capsys.readouterr().err
    assert f"{flag} " in error or f"{flag}: " in error


def test_underscores_are_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "m", "--data", str(tmp_path / "my_data.jsonl"), "--output", "o"]
    assert main(["train", *words, "--learning_rate", "1e-3", "--lora_r=4"]) == 1
    assert "my_data.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (VeneerError("what and why"), 1, "error: what and why\n"),
        (OSError(28, "No space left on device"), 1, "error: the disk is full (No space left on device)"),
        (ZeroDivisionError("division by zero"), 1, "error: unexpected ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_failures(
    raised: BaseException,
    code: int,
    said: str,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(path: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr("veneer.lora_file.open_lora", fail)
    assert main(["inspect", str(adapter)]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(said)
    assert "Traceback" not in captured.err
    if code == 1:
        assert main(["inspect", str(adapter), "--verbose"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_warnings_are_one_line(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(path: object) -> dict[str, str]:
        warnings.warn("look here", VeneerWarning, stacklevel=1)
        warnings.warn("of another library", DeprecationWarning, stacklevel=1)
        return {"a": "b"}

    monkeypatch.setattr("veneer.lora_file.open_lora", lambda path, **options: path)
    monkeypatch.setattr("veneer.training.adapters.describe", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["inspect", str(adapter), "--json", "--no-spectrum"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: look here\n"
    assert json.loads(captured.out)["a"] == "b"


HOSTILE = "\x1b]0;title\x07\n[red]\u202e:smile:"
#: Names of tensors with such characters are refused.
TENSOR = "[red]:smile:"


@pytest.fixture
def hostile(adapter: Path, tmp_path: Path) -> Path:
    """An adapter whose file names, configuration and tensors hold what a terminal would act upon."""
    place = tmp_path / HOSTILE
    place.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": HOSTILE, "target_modules": [HOSTILE], "modules_to_save": [HOSTILE]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    named = {key.replace("layers.1.mlp.down_proj", f"layers.1.{TENSOR}"): t for key, t in tensors.items()}
    named[f"base_model.model.{TENSOR}.weight"] = torch.ones(2)
    save_file(named, place / "adapter_model.safetensors")
    return place


@pytest.mark.parametrize(
    ("words", "code", "titles", "tensors"),
    [
        (["ls", "."], 0, 3, 0),
        (["inspect", "ADAPTER"], 0, 4, 2),
        (["inspect", "ADAPTER", "--modules"], 0, 4, 3),
        (["inspect", "ADAPTER", "--no-spectrum"], 0, 4, 2),
        (["merge", "ADAPTER", "--output", "out"], 1, 1, 0),
        (["export", "ADAPTER", "out", "--target", "vllm"], 1, 1, 1),
        (["eval", "ADAPTER", "--data", HOSTILE + ".jsonl"], 1, 1, 0),
        (["generate", "ADAPTER", "hello"], 1, 1, 0),
        (["plan", "ADAPTER"], 1, 1, 0),
        ([HOSTILE], 2, 1, 0),
    ],
    ids=lambda value: "-".join(value[::2]).lower() if isinstance(value, list) and value[1:] else "",
)
def test_what_a_file_names_is_shown_and_not_obeyed(
    words: list[str],
    code: int,
    titles: int,
    tensors: int,
    hostile: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(hostile.parent)
    assert main([hostile.name if word == "ADAPTER" else word for word in words]) == code
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", said)
    assert (said.count("\\x1b]0;title\\x07"), said.count("[red]:smile:")) == (titles, tensors)
    assert "\n[red]\\u202e" not in captured.out


@pytest.mark.parametrize("words", [["ls", "."], ["inspect", "ADAPTER"]], ids=lambda words: words[0])
def test_json_has_names_as_they_are(
    words: list[str], hostile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(hostile.parent)
    assert main([*(hostile.name if word == "ADAPTER" else word for word in words), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = told[0] if isinstance(told, list) else told
    assert found["path"] == HOSTILE and found["base"] == HOSTILE and found["target_modules"] == [HOSTILE]
