"""`veneer env`."""

from __future__ import annotations

import json

import pytest
import torch

from veneer.cli import main


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert any(line.split() == ["torch", torch.__version__] for line in out.splitlines())
    assert "cpu features" in out and "hub cache" in out
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__
