"""The lines of the README do what they say, on a tiny model in the place of the real one."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.unit.training.tiny import saved_records, saved_tiny
from veneer.cli import main

README = ROOT / "README.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a tiny base, and the data that the README names."""
    monkeypatch.chdir(tmp_path)
    saved_tiny(tmp_path / "base")
    saved_records(tmp_path / "mails.jsonl")
    saved_records(tmp_path / "held-out.jsonl")
    return tmp_path


def test_ten_lines_of_python_train_a_model(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in blocks(README) if block.language == "python")
    assert len([line for line in block.code.splitlines() if line.strip()]) <= 10
    assert MODEL in block.code
    found: dict[str, object] = {}
    exec(compile(block.code.replace(MODEL, "base"), str(README), "exec"), found)
    assert type(found["model"]).__name__ == "LlamaForCausalLM"
    assert (here / "my-adapter" / "adapter_model.safetensors").is_file()


def test_five_lines_on_the_command_line_go_from_plan_to_merge(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        line
        for block in blocks(README)
        if block.language == "bash"
        for line in block.code.splitlines()
        if line.startswith("veneer ")
    ]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line.replace(MODEL, "base"), comments=True)[1:]
        assert main(words) == 0, (line, capsys.readouterr().err)
        assert capsys.readouterr().out.strip(), line
    assert (here / "my-model" / "config.json").is_file()


def test_its_figures_are_those_of_the_pages() -> None:
    readme = README.read_text(encoding="utf-8")
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    peak = re.search(
        r"^\| peak of a step, bfloat16, dropout 0\.05.*\| ([\d,]+) \| ([\d,]+) \|$", performance, re.M
    )
    assert peak is not None
    assert f"| {peak[2]} MB | {peak[1]} MB |" in readme
    demo = (ROOT / "docs" / "guides" / "demo.md").read_text(encoding="utf-8")
    for row, shown in (
        ("valid JSON", "valid JSON"),
        ("exact answers", "exact match"),
        ("held-out loss",) * 2,
    ):
        figures = re.search(rf"^ *{row} +(\S+) +(\S+)", demo, re.M)
        assert figures is not None
        assert f"| {shown} | {figures[1]} | {figures[2]} |" in readme
    assert re.search(r"^(\d+) s, \d+ CPU seconds", demo, re.M)[1] in readme  # type: ignore[index]


def test_it_counts_its_own_dependencies() -> None:
    line = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert line is not None
    assert f"| packages it requires directly | {line[1].count('>=')} |" in README.read_text(encoding="utf-8")


def test_it_counts_those_of_peft_and_its_commands() -> None:
    peft = importlib.metadata.distribution("peft")
    required = [line for line in peft.requires or () if "extra ==" not in line]
    readme = README.read_text(encoding="utf-8")
    assert f"PEFT is version {peft.version}." in readme and not peft.entry_points
    assert re.search(rf"^\| packages it requires directly \| \d+ \| {len(required)} \|$", readme, re.M)
