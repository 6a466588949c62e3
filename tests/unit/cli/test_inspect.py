"""`veneer inspect`, and how every command refuses a broken adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.tools.test_converting import save
from veneer.cli import main


def test_inspect(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "rank        4\n" in out and "scaling     4 (alpha / r)\n" in out and "down_proj" in out
    assert "32×48" in out and "The first 4 directions hold" in out
    assert main(["inspect", str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == 14 and found["scalings"] == [4.0]
    assert len(found["updates"]) == 14
    assert all(len(u["singular_values"]) == 4 and u["energy_first"]["k"] == 4 for u in found["updates"])


def test_headers_only(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("veneer.training.spectra.spectra", None)
    assert main(["inspect", str(adapter), "--no-spectrum"]) == 0
    out = capsys.readouterr().out
    assert "4×48" in out and "directions" not in out
    assert main(["inspect", str(adapter), "--no-spectrum", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == []


def test_every_module_and_a_picture(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(adapter), "--modules", "--first", "1"]
    assert main([*words, "--plot", str(tmp_path / "map.png")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in out and "stable" in out and "first direction holds" in out
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    for wrong, said in (("map.gif", ".png"), ("nowhere/map.png", "no directory")):
        assert main([*words, "--plot", str(tmp_path / wrong)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and said in captured.err


def test_an_untrained_adapter_is_said(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeroed = {k: torch.zeros_like(t) if ".lora_B." in k else t for k, t in tensors.items()}
    save_file(zeroed, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    assert main(["inspect", str(tmp_path)]) == 0
    assert "14 of 14 updates are zero" in capsys.readouterr().out


def test_the_layout_of_experts_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(save(tmp_path / "a", "tinker"))
    assert main(["inspect", source, "--no-spectrum"]) == 0
    assert "experts     in the layout tinker: its tensors have an axis of experts" in capsys.readouterr().out
    assert main(["inspect", source, "--no-spectrum", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"]["layout"] == "tinker"
    assert main(["inspect", str(save(tmp_path / "b", "peft")), "--no-spectrum"]) == 0
    assert "experts     in the layout peft or unsloth: " in capsys.readouterr().out


@pytest.mark.parametrize("command", [["inspect"], ["generate"], ["merge", "--output", "out"]], ids=" ".join)
def test_broken_adapters_are_refused(
    command: list[str],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["hello"] if command == ["generate"] else []
    broken = tmp_path / "broken"
    broken.mkdir()

    def refused(place: str) -> str:
        assert main([*command, place, *more]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ")
        assert "Traceback" not in captured.err and "bug" not in captured.err
        return captured.err

    assert "nowhere" in refused("nowhere")
    assert "adapter_config.json" in refused("broken")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / name).write_bytes((adapter / name).read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    assert "adapter_model.safetensors" in refused("broken")
    (broken / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (broken / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused("broken")
    assert not (tmp_path / "out").exists()
