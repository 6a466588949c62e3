"""`veneer import`: files of diffusers and of sd-scripts, from the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.tools.test_converting import archive, save
from veneer.cli import main
from veneer.integrations.imports import importing

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {}
    for stem in (STEM, "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, 6), f"{stem}.lora_up.weight": torch.ones(6, 2)}
    place = tmp_path / "style.safetensors"
    save_file(tensors, place)
    return place


def test_import(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["import", str(file), str(out), "--model", "org/pipeline"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "as kohya writes them" in captured.out
    assert f"unet: 1 modules (1 of rank 2): {out / 'unet'}" in captured.out
    config = json.loads((out / "text_encoder" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/pipeline" and config["peft_type"] == "LORA"
    assert main(["inspect", str(out / "unet")]) == 0
    assert "to_q" in capsys.readouterr().out
    assert main(["import", str(file), str(out)]) == 1
    assert "--overwrite-output-dir" in capsys.readouterr().err
    assert main(["import", str(file), str(out), "--overwrite-output-dir", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["spelling"] == "kohya" and set(report["adapters"]) == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["FILE"], 2, "output"),
        (["FILE", "OUT", "--modle", "x"], 2, "--model"),
        (["NOWHERE", "OUT"], 1, "no file or directory"),
        (["TRUNCATED", "OUT"], 1, "truncated"),
        (["STRANGE", "OUT"], 1, "the base model (--model)"),
        (["EMPTY", "OUT"], 1, "no file of tensors"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    words: list[str],
    code: int,
    said: str,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: tmp_path / f"{name.lower()}.safetensors" for name in ("NOWHERE", "TRUNCATED", "STRANGE")}
    places |= {"FILE": file, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    places["EMPTY"].mkdir()
    places["TRUNCATED"].write_bytes(file.read_bytes()[:-3])
    save_file({"lora_unet_of_my_own.lora_down.weight": torch.ones(2, 6)}, places["STRANGE"])
    assert main(["import", *(str(places.get(word, word)) for word in words)]) == code
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not places["OUT"].exists()


def test_control_c_leaves_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importing, "compare", lambda *given: signal.raise_signal(signal.SIGINT))
    assert main(["import", str(file), str(tmp_path / "new" / "out")]) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["style.safetensors"]


def test_layouts_of_experts_and_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They become PEFT's, over the base that the adapter or the command names."""
    named, unnamed = save(tmp_path / "a", "sglang"), save(tmp_path / "b", "tinker", base=None)
    assert main(["import", str(named), str(tmp_path / "from-directory")]) == 0
    assert "written: peft (" in capsys.readouterr().out
    words = ["import", str(archive(unnamed, tmp_path / "run.tar")), str(tmp_path / "from-archive")]
    assert main(words) == 1
    assert "give it with --model" in capsys.readouterr().err
    assert main([*words, "--model", "Qwen/Qwen3-30B-A3B", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["found"], found["layout"]) == ("tinker", "peft")
    ambiguous = save(tmp_path / "c", "peft")
    assert main(["import", str(ambiguous), str(tmp_path / "out")]) == 1
    assert "the layout of the experts is ambiguous" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
