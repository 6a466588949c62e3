"""Every command of the tutorial runs, in its short form; its pictures are drawn from what commands print."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import ROOT
from veneer.cli import main


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


terminal = tool("terminal")
tutorial = tool("tutorial")


@pytest.mark.model
@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = tutorial.steps()
    names = [step.words[1] for step in steps]
    assert names[0] == "examples/demo.py" and {
        "plan",
        "train",
        "inspect",
        "eval",
        "generate",
        "chat",
        "merge",
        "ls",
    } <= set(names)
    assert tutorial.perform(steps[0], tmp_path, True, None) == 0
    for step in steps[1:]:
        assert step.words[0] == "veneer"
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in step.typed)))
        assert main([*step.words[1:], *step.short]) == 0, (step.line, capsys.readouterr().err)
        captured = capsys.readouterr()
        assert captured.out.strip() or captured.err.strip()
    assert (tmp_path / "reader" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
    assert (tmp_path / "updates.png").is_file()


def test_each_picture_of_the_page_is_one_that_is_drawn() -> None:
    page = tutorial.PAGE.read_text(encoding="utf-8")
    drawn = {step.picture for step in tutorial.steps() if step.picture} | {"updates"}
    assert all(f"(images/tutorial-{name}.png)" in page for name in drawn)
    sizes = [(ROOT / "docs" / "images" / f"tutorial-{name}.png").stat().st_size for name in drawn]
    assert max(sizes) < 150_000


def test_a_screen_shows_what_a_terminal_would() -> None:
    screen = terminal.Screen(columns=10)
    screen.feed("one\r\ntwo\x1b[1A\r\x1b[2KONE\x1b[?25l\r\n\x1b[31mr\x1b[1med\x1b[0m")
    assert screen.text() == "ONE\nred\n"
    assert screen.lines[1][0][1].colour == terminal.PALETTE[1] and screen.lines[1][1][1].bold
    screen = terminal.Screen(columns=4)
    screen.feed("abcdef\r\n50%\r100%\b\x1b[0K!")
    assert screen.text() == "abcd\nef\n100!\n"


def test_a_command_in_a_terminal_is_typed_to_and_drawn(tmp_path: Path) -> None:
    code = "import sys; print(sys.stdout.isatty()); print(input('name> ').upper())"
    done = terminal.run([sys.executable, "-c", code], tmp_path, ["ada"])
    screen = terminal.Screen()
    screen.feed(done.raw)
    assert done.code == 0 and screen.text() == "True\nname> ada\nADA\n"
    terminal.draw(screen, tmp_path / "screen.png", "title")
    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_command_is_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = tutorial.Step("veneer inspect nowhere", "x", (), ())
    assert tutorial.perform(step, tmp_path, False, tmp_path) == 1
    assert not (tmp_path / "tutorial-x.png").exists()
