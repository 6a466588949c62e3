"""The command `python -m veneer.as_peft`: what it writes, and how it fails."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from veneer import as_peft

LINE = "import os; os.environ.get('VENEER_AS_PEFT') == '1' and "


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages of the test's own."""
    place = tmp_path / "site-packages"
    place.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(place))
    return place


def test_install_and_uninstall_as_often_as_one_likes(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = site / "veneer_as_peft.pth"
    for _ in range(2):
        assert as_peft.main(["install"]) == 0
        assert str(file) in capsys.readouterr().out
        assert [path.name for path in site.iterdir()] == [file.name]
        (line,) = file.read_text().splitlines()
        assert line.startswith(LINE)
    assert as_peft.main(["uninstall"]) == 0
    assert "removed" in capsys.readouterr().out
    assert as_peft.main(["uninstall"]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert list(site.iterdir()) == []


def test_a_directory_that_cannot_be_written(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.rmdir()
    site.write_text("a file where the directory should be")
    for command in ("install", "uninstall"):
        assert as_peft.main([command]) == 1
        out, err = capsys.readouterr()
        assert not out
        for word in (str(site), "Not a directory", "nothing was changed", "virtual environment", "as_peft"):
            assert word in err
    assert site.read_text() == "a file where the directory should be"


def test_half_a_line_is_never_written(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert as_peft.main(["install"]) == 1
    assert "Permission denied" in capsys.readouterr().err
    assert list(site.iterdir()) == []


def test_installing_follows_no_link(site: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("veneer_as_peft.pth", f".veneer_as_peft.pth.part{os.getpid()}"):
        (site / name).symlink_to(victim)
    as_peft.install()
    assert victim.read_text() == "precious"
    assert (site / "veneer_as_peft.pth").read_text().startswith(LINE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage:"),
        (["-m"], "usage:"),
        (["--no-such-option"], "no such option: --no-such-option"),
        (["install", "here"], "./install"),
        (["uninstall", "all"], "takes no arguments, got all"),
    ],
)
def test_what_makes_no_sense_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_peft.main(words) == 2
    out, err = capsys.readouterr()
    assert said in err and not out


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_peft.main([word]) == 0
    assert "uninstall" in capsys.readouterr().out
