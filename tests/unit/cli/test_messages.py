"""Errors in the words of the command line, and the noise of others kept off the screen."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.cli import common, messages

FLAGS = {
    "lora_r": "--lora-r",
    "lora_alpha": "--lora-alpha",
    "learning_rate": "--learning-rate",
    "epochs": "--num-train-epochs",
    "dtype": "--dtype",
}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("r must be an integer, got 0", "--lora-r must be an integer, got 0"),
        ("bad:\n  - r must be above 0", "bad:\n  - --lora-r must be above 0"),
        ("lora_alpha is 8, r=64: pass lora_alpha=8", "--lora-alpha is 8, --lora-r=64: pass --lora-alpha=8"),
        ("learning_rate must be above 0; epochs must be", "--learning-rate must be above 0; epochs must be"),
        ("no 'learning_rate' in out/learning_rate.txt", "no 'learning_rate' in out/learning_rate.txt"),
        ("model.lora_alpha and lora_alpha.json", "model.lora_alpha and lora_alpha.json"),
        ("of w. untie=True gives it its own", "of w. --untie gives it its own"),
        ("it names; check_base=False loads it all the same", "it names"),
        ("made for; strict=False loads what fits.", "made for."),
        ("or is r wide", "or is r wide"),
    ],
)  # fmt: skip
def test_options_are_named_as_flags(said: str, shown: str) -> None:
    assert messages.in_flags(said, FLAGS) == shown


def test_other_commands_keep_the_words() -> None:
    assert messages.in_flags("r must be above 0", {}) == "r must be above 0"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), ["disk is full", "out/x", "Free some"]),
        (OSError(errno.EFBIG, "File too large"), ["disk is full"]),
        (RuntimeError("Error while serializing: I/O error: No space left on device"), ["disk is full"]),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/1"), ["disk is full"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "mails.jsonl"), ["mails.jsonl: No such file"]),
        (PermissionError(errno.EACCES, "Permission denied"), ["Permission denied"]),
        (MemoryError(), ["out of memory", "--batch-size"]),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), ["out of memory", "2 GiB)"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value)[:30],
)
def test_errors_of_the_machine(error: Exception, words: list[str]) -> None:
    said = messages.of_system(error)
    assert said is not None and "\n" not in said
    assert all(word in said for word in words)


def test_other_errors_are_not_the_machines() -> None:
    assert messages.of_system(ValueError("x")) is None


def test_whose_error_it_is() -> None:
    import json

    with pytest.raises(ValueError, match="Expecting") as own:
        json.loads("{")
    assert "a bug in Veneer" in messages.unexpected(own.value)
    with pytest.raises(AttributeError) as foreign:
        __import__("rich.console").console.Console().print("x", style=object())
    said = messages.unexpected(foreign.value)
    assert "AttributeError" in said and "raised in rich" in said and "--verbose" in said


def test_ctrl_c_behind_another_error() -> None:
    wrapped = ImportError("a compiled module could not be started")
    wrapped.__cause__ = KeyboardInterrupt()
    assert messages.was_interrupted(wrapped)
    assert not messages.was_interrupted(ImportError("x"))


def test_flags_of_a_command() -> None:
    common.register_commands()
    assert common.flags_of("merge")["output"] == "--output"
    assert common.flags_of("nothing") == {}


def test_every_file_is_a_command(tmp_path: Path) -> None:
    (tmp_path / "shout.py").write_text(
        "from veneer.cli.common import app\n@app.command()\n"
        "def shout(word: str) -> None:\n    print(word.upper())\n"
    )
    code = (
        "import sys, veneer.cli\n"
        f"veneer.cli.__path__.append({str(tmp_path)!r})\n"
        "sys.exit(veneer.cli.main(['shout', 'hello']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "HELLO\n", "")


def test_a_full_disk_under_standard_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "veneer", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "veneer", "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_colour_without_a_terminal() -> None:
    environment = {**os.environ, "GITHUB_ACTIONS": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "veneer", "--help"], capture_output=True, text=True, env=environment
    )
    assert "\x1b" not in done.stdout
