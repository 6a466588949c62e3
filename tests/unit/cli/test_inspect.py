"""`veneer inspect`, and how every command refuses a broken adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.cli import main


def test_inspect(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "rank        4\n" in out and "scaling     4\n" in out and "down_proj" in out and "4 × 48" in out
    assert main(["inspect", str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == 14 and found["scalings"] == [4.0]


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
    (broken / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused("broken")
    assert not (tmp_path / "out").exists()
