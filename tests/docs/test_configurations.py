"""Every configuration of examples/configs trains a tiny model, or is planned where it needs a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.unit.training.tiny import saved_tiny
from veneer.cli import main

CONFIGURATIONS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
#: An optimizer and bits that bitsandbytes has for GPUs.
NEED_A_GPU = {"qlora-one-gpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny(tmp_path_factory.mktemp("base"))


def test_there_is_one_for_each_kind_of_run() -> None:
    kinds = {"instruction-tuning", "qlora-one-gpu", "dpo", "classification", "several-gpus", "sweep"}
    assert {path.stem for path in CONFIGURATIONS} == kinds
    page = (ROOT / "docs" / "how-to" / "configurations.md").read_text(encoding="utf-8")
    assert all(f"(../../examples/configs/{kind}.yaml)" in page for kind in kinds)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_configuration_works(
    path: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = path.read_text(encoding="utf-8")
    command = "sweep" if "grid:" in text else "train"
    if command == "train":
        assert main(["train", str(path), "--print-config"]) == 0
    capsys.readouterr()
    examples = re.findall(r"^#   (\{.*\})$", text, re.M)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in examples * 4), encoding="utf-8")
    if path.stem in NEED_A_GPU:
        assert main(["plan", str(base), str(path), "--device", "cuda", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["estimate"]["peak"] > 0
        return
    files = ["--model", str(base), "--data", str(data), "--output", str(tmp_path / "out")]
    if "eval_data:" in text:
        files += ["--eval-data", str(data)]
    short = ["--max-steps", "1", "--batch-size", "2", "--gradient-accumulation-steps", "1", "--json"]
    assert main([command, str(path), *files, *short]) == 0
    metrics = json.loads(capsys.readouterr().out)
    if command == "sweep":
        assert len(metrics["runs"]) == 12 and {run["step"] for run in metrics["runs"]} == {1}
        assert (tmp_path / "out" / "best" / "adapter_model.safetensors").is_file()
        return
    assert metrics["steps"] == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
