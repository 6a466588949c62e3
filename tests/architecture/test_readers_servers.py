"""The servers that `make readers` starts end with it, and it runs every line of docs/serving.md."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.programs import load_program

ROOT = Path(__file__).parents[2]
SERVER = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from readers_servers import Shell
with Shell(Path(sys.argv[1]), dict(os.environ), []).serving(sys.argv[2], int(sys.argv[3])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_program(monkeypatch, "readers_servers", "tools/readers_servers.py")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def line(tmp_path: Path, port: int) -> str:
    """Starts a server behind another process."""
    (tmp_path / "server.py").write_text(SERVER)
    return f"{sys.executable} server.py {port}; true"


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_ends_with_its_block(servers: ModuleType, tmp_path: Path, line: str, port: int) -> None:
    shell = servers.Shell(tmp_path, dict(os.environ), [])
    with shell.serving(line, port):
        assert listens(port)
        with pytest.raises(SystemExit, match="is taken"), shell.serving(line, port):
            pass
        assert listens(port)
    assert not listens(port)


def test_a_server_ends_when_the_run_is_killed(tmp_path: Path, line: str, port: int) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, line, str(port)], env=env)
    assert done.returncode == -signal.SIGKILL
    for _ in range(100):
        if not listens(port):
            return
        time.sleep(0.1)
    pytest.fail("it still listens")


def test_the_last_words_of_a_server_that_fails(servers: ModuleType, tmp_path: Path, port: int) -> None:
    with (
        pytest.raises(SystemExit, match=r"(?s)does not answer.*no such model"),
        servers.Shell(tmp_path, dict(os.environ), []).serving("echo no such model; exit 3", port),
    ):
        pass


def test_every_line_of_the_page_is_run(servers: ModuleType) -> None:
    lines = servers.lines(servers.PAGE.read_text(encoding="utf-8"))
    targets = [servers.target_of(line) for line in lines if not line.startswith("curl ")]
    assert len(targets) > 5 and set(targets) == set(servers.SERVERS)
    started = [line for line in lines if any(server.program in line for server in servers.SERVERS.values())]
    assert len(started) == 4 and lines[0] in started
