"""`veneer chat` with piped input and as a process: answers on one stream, all else on the other."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.training.tiny import saved_tiny
from veneer.cli import main
from veneer.cli.chat import _talk


@pytest.fixture
def second(adapter: Path, tmp_path: Path) -> Path:
    """Another adapter of the same base."""
    from safetensors.torch import load_file, save_file

    place = tmp_path / "second"
    place.mkdir()
    (place / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {key: -tensor if "lora_B" in key else tensor for key, tensor in tensors.items()},
        place / "adapter_model.safetensors",
    )
    return place


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *words: str
) -> tuple[int, list[str], list[str]]:
    """(exit code, answers, messages)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    code = main(["chat", *words, "--max-new-tokens", "5"])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_adapters_are_switched_while_talking(
    adapter: Path, second: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Double 11.", "/base", "/again", "", "/adapter other", "/again", "/adapter default", "/again",
             "/adapter", "/clear", "/exit", "never asked"]  # fmt: skip
    code, answers, messages = chat(monkeypatch, capsys, lines, str(adapter), "--adapter", f"other={second}")
    assert code == 0 and len(answers) == 4
    assert answers[0] == answers[3] and len(set(answers)) == 3
    assert messages == [
        "the base model answers",
        "other answers",
        "default answers",
        "  * default",
        "    other",
        "    base model (/base)",
        "forgotten",
    ]
    for words, expected in (([str(adapter)], answers[0]), ([str(adapter), "--base"], answers[1])):
        assert main(["generate", *words, "Double 11.", "--max-new-tokens", "5"]) == 0
        assert capsys.readouterr().out.strip() == expected.strip()


def test_commands_that_do_not_exist_are_not_asked(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/adaptr", "/what", "/adapter nope", "/again", "/help"]
    code, answers, messages = chat(monkeypatch, capsys, lines, str(adapter))
    assert (code, answers) == (1, [])
    assert messages[0].startswith("error: no command /adaptr (did you mean '/adapter'?); there are /adapter,")
    assert messages[1].startswith("error: no command /what; there are /adapter, /base")
    assert messages[2] == "error: no adapter 'nope'; there are: default"
    assert messages[3] == "error: nothing has been asked yet"
    assert messages[4].strip().startswith("/adapter") and messages[-1].strip().startswith("/exit")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter", "path-only"], "--adapter takes NAME=PATH, not 'path-only'"),
        (["--adapter", "default=a"], "the name 'default' is the adapter given first"),
        (["--adapter", "b=a", "--adapter", "b=c"], "the name 'b' is used twice"),
        (["--temperature", "-1"], "--temperature must be at least 0, not -1.0"),
        (["--top-p", "2"], "--top-p must be above 0 and at most 1, not 2.0"),
        (["--no-do-sample", "--top-k", "3"], "--do-sample is off"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(words: list[str], said: str, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(adapter), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err


def test_bad_adapters_are_found_before_the_base_is_loaded(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("veneer.training.adapters.load_base", None)
    assert main(["chat", str(adapter), "--adapter", f"b={tmp_path / 'nowhere'}"]) == 1
    assert "nowhere" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"\x40")
    for words in ([str(broken)], [str(adapter), "--adapter", f"b={broken}"]):
        assert main(["chat", *words]) == 1
        assert "adapter_model.safetensors" in capsys.readouterr().err


def test_a_base_that_does_not_fit(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = saved_tiny(tmp_path / "other", seed=5)
    capsys.readouterr()
    assert main(["chat", str(adapter), "--model", str(other)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and "Traceback" not in captured.err


def test_as_a_process(adapter: Path) -> None:
    command = [sys.executable, "-m", "veneer", "chat", str(adapter), "--max-new-tokens", "5"]
    talk = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert talk.stdin is not None and talk.stdout is not None
    talk.stdin.write("Double 11.\n/base\n/again\n")
    talk.stdin.flush()
    answers = talk.stdout.readline() + talk.stdout.readline()
    assert answers.count("\n") == 2 and "\x1b" not in answers
    talk.send_signal(signal.SIGINT)  # at the prompt
    more, said = talk.communicate(timeout=60)
    assert talk.returncode == 130 and not more and "\x1b" not in said
    # On a busy machine, what takes long is said first.
    assert said.splitlines()[-2:] == ["the base model answers", "interrupted"]


def test_ctrl_c_at_the_prompt_keeps_the_conversation_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([None, "Double 11.", None, None, "never asked"])

    def line(prompt: str) -> str:
        found = next(typed)
        if found is None:
            raise KeyboardInterrupt
        return found

    asked: list[str] = []
    monkeypatch.setattr("builtins.input", line)
    talk = SimpleNamespace(adapter="default", ask=lambda text, write: asked.append(text))
    with pytest.raises(KeyboardInterrupt):
        _talk(talk, alone=True)
    assert asked == ["Double 11."]
    assert capsys.readouterr().err.count("Ctrl-C once more, or Ctrl-D, leaves") == 2


def test_at_a_terminal(adapter: Path) -> None:
    """The prompt names who answers, and Ctrl-D leaves with 0."""
    master, slave = os.openpty()
    command = [sys.executable, "-m", "veneer", "chat", str(adapter), "--max-new-tokens", "3"]
    heard = b""
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as talk:
        os.close(slave)
        try:
            for until, answer in (
                (b"default> ", b"Double 11.\n"),
                (b"default> ", b"/base\n"),
                (b"base> ", b"\x04"),
            ):
                while until not in heard:
                    assert select.select([master], [], [], 60)[0], heard
                    heard += os.read(master, 4096)
                assert b"error" not in heard and b"\x1b[3" not in heard
                heard = b""
                os.write(master, answer)
            assert talk.wait(timeout=60) == 0
        finally:
            talk.kill()
            os.close(master)
