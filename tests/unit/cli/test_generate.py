"""`veneer generate`: prompts from arguments and standard input, with and without the adapter."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from veneer.cli import main


def test_generate(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(adapter), "--max-new-tokens", "5"]
    assert main([*words, "Double 11."]) == 0
    answer = capsys.readouterr()
    assert answer.err == ""
    assert main([*words, "Double 11.", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "Double 11.", "generated_text": answer.out[:-1]}
    monkeypatch.setattr(sys, "stdin", io.StringIO("Double 11.\n"))
    assert main(words) == 0
    assert capsys.readouterr().out == answer.out
    assert main([*words, "Double 11.", "--base"]) == 0
    assert capsys.readouterr().out != answer.out
