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


def test_plain_of_a_dora_says_what_it_misses(
    dora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(dora), "--plain", "--rank", "8"]
    assert main([*words, str(tmp_path / "plain")]) == 0
    shown = capsys.readouterr()
    assert "of the" in shown.out and "of an update is missed" in shown.out and "of an output" in shown.out
    assert "modules made plain" in shown.err
    assert main([*words, str(tmp_path / "json"), "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    assert modules and all(0 < m["output_error"] < m["update_error"] < 1 for m in modules.values())
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["use_dora"] is False


def test_plain_of_what_needs_no_decomposition(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(adapter), str(tmp_path / "plain"), "--plain"]) == 0
    assert "modules of plain LoRA: every update is the same" in capsys.readouterr().out
    assert main(["convert", str(adapter), str(tmp_path / "json"), "--plain", "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    assert {m["update_error"] for m in modules.values()} == {0.0}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--plain"], "is a DoRA: --plain needs the rank of the result, --rank N"),
        (["--rank", "2"], "--rank is for --plain"),
        (["--plain", "--layout", "peft", "--rank", "2"], "are two conversions"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], said: str, dora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(dora), str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_rank_for_what_is_no_dora(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(adapter), str(tmp_path / "out"), "--plain", "--rank", "2"]) == 2
    assert "is no DoRA, so every rank stays" in capsys.readouterr().err
