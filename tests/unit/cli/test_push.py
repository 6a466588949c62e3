"""`veneer push`: what it sends, to a hub on this machine, and what it refuses before anything is sent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.interop.hub_server import TOKEN, Hub, serve
from veneer.cli import main

FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve({}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_push(hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(adapter), "me/mine", "--private"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"pushed: {hub.endpoint}/me/mine/commit/")
    assert f"Pushing {adapter} to me/mine: README.md (" in captured.err and " kB)" in captured.err
    assert hub.repositories["me/mine"].private
    sent = hub.repositories["me/mine"].branches["main"]
    assert sent == {name: (adapter / name).read_bytes() for name in FILES}
    assert main(["push", str(adapter), "me/mine", "--commit-message", "Again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"].keys() == set(FILES)


def test_what_is_refused_is_one_line(
    hub: Hub,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*words: str) -> str:
        assert main(["push", *words]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.splitlines()[-1].startswith("error: ")
        return captured.err.splitlines()[-1]

    half = shutil.copytree(adapter, tmp_path / "half")
    (half / "adapter_model.safetensors").write_bytes(b"{}")
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "r": -1}))
    assert "adapter_model.safetensors" in refused(str(half), "me/mine")
    assert "r must be" in refused(str(other), "me/mine")
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json in" in refused(str(tmp_path / "empty"), "me/mine")
    assert "there is no directory" in refused(str(tmp_path / "nowhere"), "me/mine")
    assert hub.asked == []
    assert "me/mine/too/deep" in refused(str(adapter), "me/mine/too/deep")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "Log in with `hf auth login`, or set HF_TOKEN" in refused(str(adapter), "me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "nothing was pushed to me/mine: HF_HUB_OFFLINE=1 is set" in refused(str(adapter), "me/mine")
