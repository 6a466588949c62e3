"""The converter of llama.cpp is run where it is on the PATH; here a small program stands for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.integrations.export.adapters import save
from veneer import export_adapter
from veneer.errors import ExportError

WRITES = """#!/usr/bin/env python3
import json, sys
words = sys.argv[1:]
json.dump(words, open(words[words.index("--outfile") + 1], "w"))
"""
FAILS = """#!/bin/sh
echo "Unexpected name" >&2
exit 1
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place), prepend=":")
    return place / "convert_lora_to_gguf.py"


def test_the_file_is_written_by_the_converter(installed: Path, tmp_path: Path) -> None:
    installed.write_text(WRITES)
    adapter = save("linear", tmp_path)
    report = export_adapter(adapter.place, tmp_path / "out", "llama.cpp")
    words = json.loads((tmp_path / "out" / "adapter.gguf").read_text())
    assert words[:2] == ["--base", str(adapter.base)]
    assert report.files == ("adapter_config.json", "adapter_model.safetensors", "adapter.gguf")
    assert report.usage == f"llama-server --model BASE.gguf --lora {tmp_path}/out/adapter.gguf"


def test_a_base_that_nobody_names_is_left_to_the_user(installed: Path, tmp_path: Path) -> None:
    installed.write_text(WRITES)
    place = save("embedding", tmp_path).place
    report = export_adapter(place, tmp_path / "out", "llama.cpp")
    assert "adapter.gguf" not in report.files and "--base-model-id BASE " in report.usage
    config = place / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "BASE"}))
    assert "adapter.gguf" in export_adapter(place, tmp_path / "named", "llama.cpp").files


def test_a_converter_that_fails_leaves_nothing(installed: Path, tmp_path: Path) -> None:
    installed.write_text(FAILS)
    installed.chmod(0o755)
    adapter = save("linear", tmp_path)
    with pytest.raises(ExportError, match=r"(?s)failed:.*Unexpected name.*off the PATH"):
        export_adapter(adapter.place, tmp_path / "out", "llama.cpp")
    assert not (tmp_path / "out").exists()
