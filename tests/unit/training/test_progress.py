"""Progress: a few plain lines where there is no terminal, on standard error."""

from __future__ import annotations

import pytest

from veneer.training import Silent, Terminal


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
