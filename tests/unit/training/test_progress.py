"""Progress: a few plain lines where there is no terminal, on standard error."""

from __future__ import annotations

import threading

import pytest

from veneer.training import Silent, Terminal, progress
from veneer.training.progress import waiting


def test_without_a_terminal_some_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.say("[bold]as it is[/bold]")
    with terminal.bar("training", 100) as advance:
        advance(0, "")
        for step in range(100):
            advance(1, f"loss {step}")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "[bold]as it is[/bold]"
    assert len(lines) == 6
    assert "training 20/100, loss 19" in lines[1] and "left" in lines[1]
    assert "training 100/100, loss 99" in lines[-1] and "left" not in lines[-1]
    assert "\x1b" not in captured.err and "\r" not in captured.err


def test_on_a_terminal_a_live_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    terminal = Terminal()
    terminal.console = Console(stderr=True, force_terminal=True, width=100)
    with terminal.bar("training", 4) as advance:
        for _ in range(4):
            advance(1, "loss 0.5")
    shown = capsys.readouterr().err
    assert "4/4" in shown and "loss 0.5" in shown and "left" in shown


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.say("nothing")
    with silent.bar("nothing", 3) as advance:
        advance(1, "nothing")
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_is_said_and_what_is_quick_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = threading.Event()
    monkeypatch.setattr(Terminal, "say", lambda self, line: (print(line), said.set()))
    for patience, expected in ((600.0, ""), (0.0, "Loading the model …\n")):
        monkeypatch.setattr(progress, "PATIENCE", patience)
        with waiting(Terminal(), "Loading the model"):
            assert patience or said.wait(60)
        assert capsys.readouterr().out == expected
    with waiting(Silent(), "Loading the model"), waiting(None, "Loading the model"):
        pass
    assert capsys.readouterr() == ("", "")
