"""What a bug report is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import veneer
from veneer.training import environment as module
from veneer.training.environment import LIBRARIES, environment


def test_versions_machine_and_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = json.loads(json.dumps(environment()))
    assert set(found["versions"]) == set(LIBRARIES)
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads() and found["devices"][0] == "cpu"
    assert found["caches"] == {"veneer": str(tmp_path), "hub": str(tmp_path / "hf" / "hub")}
    assert found["variables"]["VENEER_CACHE"] == str(tmp_path) and "secret" not in json.dumps(found)
    assert veneer.__version__


def test_it_does_without_what_a_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIBRARIES", ("no-such-library",))
    monkeypatch.setattr(module, "Path", lambda *_: Path("no-such-file"))
    monkeypatch.setattr(module.os, "sysconf", lambda _: (_ for _ in ()).throw(ValueError("unknown")))
    found = environment()
    assert found["versions"] == {"no-such-library": None} and found["memory"] is None
    assert found["cpu_features"] == [] and found["processor"]
