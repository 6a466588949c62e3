"""`veneer convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.tools.test_converting import save
from veneer.cli import main


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(save(tmp_path / "a", "transformers-4"))
    assert main(["convert", source, str(tmp_path / "b"), "--layout", "peft"]) == 0
    out = capsys.readouterr().out
    assert "found: transformers-4 (every expert has tensors of its own)" in out
    assert "written: peft (PEFT 0.19.1 to 0.21, target_parameters)" in out
    assert "experts: 4 in each of 2 layers" in out and "tensors: 50 read, 10 written" in out
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--layout", "tinker", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["found"], found["layout"], found["tensors"]) == (
        "peft",
        "tinker",
        {"read": 10, "written": 14},
    )


def test_the_flags_that_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(save(tmp_path / "a", "peft"))
    assert main(["convert", source, str(tmp_path / "b"), "--layout", "vllm"]) == 1
    assert "peft or unsloth" in (message := capsys.readouterr().err) and "--from-layout decides" in message
    assert main(["convert", source, str(tmp_path / "b"), "--layout", "nothing"]) == 2
    unnamed = str(save(tmp_path / "c", "transformers-4", base=None))
    assert main(["convert", unnamed, str(tmp_path / "b"), "--layout", "peft"]) == 1
    assert "give it with --model" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
