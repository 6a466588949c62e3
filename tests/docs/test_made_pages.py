"""Pages that are made from the code are what the code makes now."""

from __future__ import annotations

import sys

import pytest

from tests.docs.pages import ROOT
from tests.programs import load_program


@pytest.mark.parametrize("name", ["api_page", "cli_page", "exporting_table", "tools_page"])
def test_the_page_is_current(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", "--check"])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    program = load_program(monkeypatch, name, f"tools/{name}.py")
    assert program.made_page.main(program.__doc__, program.page, program.PAGE) == 0, capsys.readouterr().err
