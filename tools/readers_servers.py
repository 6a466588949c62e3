"""Run the lines of docs/serving.md as they stand, servers too, and look at what the servers answer.

The page's names are given to them: `BASE` and `BASE.gguf` are the base, `runs/mails` is an adapter that every
program reads, and `runs/dora` one that vLLM does not take.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "serving.md"
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
#: How long a server may take until it answers, and how long to stop.
STARTS, STOPS = 1800, 30


@dataclass(frozen=True)
class Server:
    """A program that serves: how its lines begin or go on, and its port where none is given."""

    program: str
    port: int


#: By the target that is exported for it.
SERVERS = {
    "llama.cpp": Server("llama-server ", 8080),
    "mlx": Server("mlx_lm.server ", 8080),
    "vllm": Server("python -m vllm.entrypoints.openai.api_server ", 8000),
}


@dataclass(frozen=True)
class Answer:
    """What a server answered to a request of the page."""

    command: str
    asked: dict[str, Any]
    answered: dict[str, Any]


@dataclass(frozen=True)
class Shell:
    """Runs lines in a directory, with these variables and first looking for programs in these places."""

    where: Path
    variables: Mapping[str, str]
    paths: list[Path]

    @property
    def log(self) -> Path:
        """What a server writes."""
        return self.where / "server.log"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with the places."""
        path = os.pathsep.join([*map(str, self.paths), os.environ["PATH"]])
        return {**self.variables, "PATH": path}

    def run(self, line: str) -> str:
        """What a line prints; SystemExit with its last words where it fails."""
        print(f"$ {line}", flush=True)
        done = subprocess.run(
            line, shell=True, cwd=self.where, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{line}\n{done.stderr[-2000:]}")
        return done.stdout

    @contextlib.contextmanager
    def serving(self, line: str, port: int) -> Iterator[None]:
        """A server, from its first healthy answer on. It ends with the block, and however this program ends.

        Raises:
            SystemExit: The port is taken, or the server ends or does not answer; with its last words.
        """
        print(f"$ {line}", flush=True)
        if not _refused(port):
            raise SystemExit(f"port {port} is taken: stop what listens there")
        # Its group ends when its standard input does.
        watched = f"exec 3<&0; (cat <&3 >/dev/null; kill 0) & {line}"
        with self.log.open("w") as log:
            process = subprocess.Popen(
                watched,
                shell=True,
                cwd=self.where,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait(process, line, port)
            yield
        finally:
            _end(process)

    def _wait(self, process: subprocess.Popen[bytes], line: str, port: int) -> None:
        last = time.monotonic() + STARTS
        while time.monotonic() < last:
            if process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                return
            time.sleep(1)
        raise SystemExit(f"{line}\ndoes not answer; its last words:\n{self.log.read_text()[-3000:]}")


def _refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, by asking first."""
    assert process.stdin is not None
    process.stdin.close()
    last = time.monotonic() + STOPS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < last:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines(page: str) -> list[str]:
    """The lines of a page's blocks for the shell; what goes on below is one line."""
    code = re.sub(r" *\\\n *", " ", "".join(_BLOCK.findall(page)))
    return [line for line in code.splitlines() if line.strip()]


def target_of(line: str) -> str | None:
    """The target whose server a line starts, or for which it exports."""
    if line.startswith("veneer export "):
        return line.rpartition("--target ")[2].split()[0]
    return next((name for name, server in SERVERS.items() if server.program in line), None)


def answers(target: str, shell: Shell, page: str, base: Path) -> Iterator[Answer]:
    """Run the lines of a target in order, and what each export prints; yield what its servers answer.

    Args:
        target: Whose lines.
        shell: Where they run.
        page: The text that they stand in.
        base: What the adapters name as their base, for which the page has `BASE`.

    Raises:
        SystemExit: A line fails, or an export prints a server's command that is not on the page.
    """
    every, command = lines(page), ""
    with contextlib.ExitStack() as running:
        for line in every:
            if line.startswith("curl "):
                if command:
                    yield Answer(command, _data(line), json.loads(shell.run(line)))
                continue
            running.close()
            command = ""
            if target_of(line) != target:
                continue
            if line.startswith("veneer export "):
                _use(shell.run(line).rpartition("use it: ")[2].strip(), base, every, shell)
            else:
                command = line
                running.enter_context(shell.serving(line, SERVERS[target].port))


def _use(printed: str, base: Path, every: list[str], shell: Shell) -> None:
    """Run what an export prints, unless it is a server's line, which has to be one of the page's."""
    if target_of(printed) is None:
        shell.run(printed)
    elif printed.replace(str(base), "BASE") not in every:
        raise SystemExit(f"the export prints {printed!r}, which is not on the page")


def _data(curl: str) -> dict[str, Any]:
    words = shlex.split(curl)
    found: dict[str, Any] = json.loads(words[words.index("-d") + 1])
    return found
