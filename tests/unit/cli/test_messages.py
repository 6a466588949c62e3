"""Errors in the words of the command line, and the noise of others kept off the screen."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.cli import common, messages
from veneer.errors import Hint, Text

FLAGS = {
    "r": messages.Flag("--lora-r"),
    "untie": messages.Flag("--untie", switch=True),
    "packing": messages.Flag("--packing", "--no-packing", switch=True),
    "init_lora_weights": messages.Flag("--init-lora-weights"),
}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (Text(Hint("r"), " must be an integer, got 0"), "--lora-r must be an integer, got 0"),
        (Text("pass ", Hint("r", 8), "; r is no option here"), "pass --lora-r 8; r is no option here"),
        (Text("say ", Hint("untie", True)), "say --untie"),
        (Text("say ", Hint("packing", False)), "say --no-packing"),
        (Text("say ", Hint("init_lora_weights", True)), "say --init-lora-weights true"),
        (Text("say ", Hint("rank", 8)), "say rank=8"),
        (Text("say ", Hint("untie", False)), "say untie=False"),
        (Text("it names", Hint("check_base", False, "; {} loads it all the same")), "it names"),
        (Text("shared", Hint("untie", True, "; {} parts them")), "shared; --untie parts them"),
    ],
)  # fmt: skip
def test_options_are_named_as_flags(said: Text, shown: str) -> None:
    assert messages.in_flags(said, FLAGS) == shown


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5 vs 4"), ["disk is full"]),
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
    assert common.flags_of("merge")["output"] == messages.Flag("--output")
    assert common.flags_of("merge")["untie"] == messages.Flag("--untie", None, True)
    assert common.flags_of("merge")["base"] == common.flags_of("merge")["model"] == messages.Flag("--model")
    assert common.flags_of("train")["packing"] == messages.Flag("--packing", "--no-packing", True)
    assert common.flags_of("train")["num_train_epochs"] == common.flags_of("train")["epochs"]
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
