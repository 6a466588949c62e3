"""The pages are true: their code runs, their outputs are what is printed, their commands and links exist."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import veneer.cli.common
from tests.docs.pages import PAGES, ROOT, Block, blocks, prose, run_page
from tests.processes import run_python
from veneer.testing import registered_for_now

NOT_RUN: dict[str, str] = {
    # "docs/page.md": "why its `python no-run` blocks cannot run"
    "README.md": "it loads a model of the hub; tests/docs/test_readme.py runs it on a tiny one",
    "docs/distributed.md": "they take several processes; tests/interop/accelerate_ranks.py makes these calls",
}
#: Pages whose blocks need another process, as peft itself may have been imported in this one.
AS_PEFT = "<!-- run with python -m veneer.as_peft -->"
IN_THE_PLACE_OF_PEFT = """
from veneer.as_peft import register_as_peft
register_as_peft()
import json, os, sys, tempfile, traceback, warnings
from pathlib import Path
from tests.docs.pages import run_page
from veneer import VeneerWarning
from veneer.testing import registered_for_now
warnings.simplefilter("error", VeneerWarning)
errors = {}
for page in sys.argv[2:]:
    os.chdir(tempfile.mkdtemp(dir=Path(sys.argv[1]).parent))
    try:
        with registered_for_now():
            run_page(Path(page))
    except Exception:
        errors[page] = traceback.format_exc()
Path(sys.argv[1]).write_text(json.dumps(errors))
"""
PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
SHELLS = {"bash", "sh", "shell", "console"}


def _id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page may need the network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a page opened a connection: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def errors_as_peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong on pages that are run in the place of PEFT, all in one process."""
    told = tmp_path_factory.mktemp("as-peft") / "errors.json"
    pages = [page for page in PYTHON_PAGES if AS_PEFT in page.read_text(encoding="utf-8")]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    run_python(IN_THE_PLACE_OF_PEFT, told, *pages, env={"PYTHONPATH": path})
    return json.loads(told.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=_id)
def test_python_blocks_run(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offline: None,
    request: pytest.FixtureRequest,
) -> None:
    if AS_PEFT in page.read_text(encoding="utf-8"):
        errors = request.getfixturevalue("errors_as_peft")
        assert str(page) not in errors, errors[str(page)]
        return
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(), registered_for_now():
        run_page(page)


FALSE_PAGES = {
    "output": ("```python\nprint(1)\n```\n```text\n2\n```\n", "shows another output"),
    "warning": ("```python\nimport warnings\nwarnings.warn('unsaid')\n```\n", "unsaid"),
    "announced": ("<!-- warns: never -->\n```python\nx = 1\n```\n", "announces warnings that did not come"),
    "error": ("```python\nx = 1\n```\nprose\n```python\n1 / 0\n```\n", "division by zero"),
}


@pytest.mark.parametrize("kind", FALSE_PAGES)
def test_a_false_page_is_found_out(kind: str, tmp_path: Path) -> None:
    text, complaint = FALSE_PAGES[kind]
    page = tmp_path / "false.md"
    page.write_text(text)
    with pytest.raises((AssertionError, UserWarning, ZeroDivisionError), match=complaint):
        run_page(page)


def test_a_true_page_passes(tmp_path: Path) -> None:
    page = tmp_path / "true.md"
    page.write_text(
        "<!-- warns: said -->\n```python\nimport warnings\nwarnings.warn('as said')\n"
        "print('one 0.123')\n```\n```text\none 0...\n```\n"
    )
    run_page(page)


def test_pages_exist() -> None:
    named = {"README.md", "docs/index.md", "docs/lora.md", "docs/concepts/low-rank.md", "docs/migrating.md"}
    assert named <= {_id(page) for page in PYTHON_PAGES}


def test_blocks_that_do_not_run_are_listed_with_a_reason() -> None:
    marked = {block.page for page in PAGES for block in blocks(page) if "no-run" in block.marks}
    assert marked == set(NOT_RUN)
    assert all(len(reason) > 20 for reason in NOT_RUN.values())


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_and_pictures_exist(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(
        r'<img[^>]* src="([^"]+)"', prose(page)
    ):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    assert not broken, f"{_id(page)} links to nothing: {broken}"


def _anchors(page: Path) -> set[str]:
    """The anchors of headings as code hosts make them: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_commands_exist(page: Path) -> None:
    lines = [
        (block.name, line) for block in blocks(page) if block.language in SHELLS for line in _commands(block)
    ]
    lines += [(_id(page), text) for text in re.findall(r"`((?:make|veneer) [a-z][^`]*)`", prose(page))]
    problems = [f"{where}: {line!r}: {problem}" for where, line in lines if (problem := _problem(line))]
    assert not problems, "\n".join(problems)


def _commands(block: Block) -> list[str]:
    joined = block.code.replace("\\\n", " ")
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split("&&")]


def _problem(line: str) -> str:
    """What is wrong with one shell command of a page; empty when nothing is."""
    words = [
        word
        for word in shlex.split(line, comments=True)
        if "=" not in word.split("/")[0] or word.startswith("-")
    ]
    if not words:
        return "no command"
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        return "" if all(target in _make_targets() for target in rest) else "no such make target"
    if program == "veneer":
        return _veneer_problem(rest)
    if program == "python" and rest[:2] in (["-m", "veneer.as_peft"], ["-m", "veneer.integrations.lm_eval"]):
        return ""
    if program == "python" and rest and rest[0].startswith("examples/"):
        return _example_problem(*rest)
    if program == "pip" and rest[0] == "install":
        unknown = set(re.findall(r"veneer\[([^\]]+)\]", line)) - _extras()
        return f"no such extra {unknown}" if unknown else ""
    if (program, *rest[:1]) == ("git", "clone") or program in ("cd", "curl"):
        return ""
    if program in ("llama-server", "mlx_lm.server") or rest[:2] == [
        "-m",
        "vllm.entrypoints.openai.api_server",
    ]:
        return ""  # `make readers` and `make readers-vllm` run them
    return "the test does not know how to check this command"


def _example_problem(path: str, *words: str) -> str:
    file = ROOT / path
    if not file.is_file():
        return "no such example"
    sources = file.read_text(encoding="utf-8") + (file.parent / "side_by_side.py").read_text(encoding="utf-8")
    unknown = [word for word in words if word.startswith("--") and f'"{word.split("=")[0]}"' not in sources]
    return f"no such flags {unknown}" if unknown else ""


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def _extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project\.optional-dependencies\]\n(.*?)(?=^\[)", text, re.M | re.S)
    assert section is not None
    return set(re.findall(r"^([\w-]+) *=", section[1], re.M))


def _veneer_commands() -> dict[str, Any]:
    for module in pkgutil.iter_modules(veneer.cli.__path__):
        importlib.import_module(f"veneer.cli.{module.name}")
    group: Any = get_command(veneer.cli.common.app)
    return dict(group.commands)


def _veneer_problem(words: list[str]) -> str:
    commands = _veneer_commands()
    if not words:
        return ""
    if words[0] not in commands:
        return f"no such subcommand; there are {sorted(commands)}"
    options = ((*p.opts, *p.secondary_opts) for p in commands[words[0]].params)
    known = {"--help"}.union(*options)
    unknown = [flag for word in words if word.startswith("-") and (flag := word.split("=")[0]) not in known]
    return f"no such flags {unknown}; there are {sorted(known)}" if unknown else ""


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("make demo", True),
        ("make nonsense", False),
        ("veneer train --model m --data d.jsonl --output out", True),
        ("veneer train --modle m", False),
        ("veneer trian", False),
        ("pip install 'veneer[train]'", True),
        ("pip install 'veneer[trian]'", False),
        ("python examples/qlora_smollm2.py --short", True),
        ("python examples/qlora_smollm2.py --long", False),
        ("python examples/nonsense.py", False),
        ("rm -rf here", False),
    ],
)
def test_wrong_commands_are_found_out(line: str, right: bool) -> None:
    assert (not _problem(line)) is right


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in _veneer_commands() if f"veneer {name}" not in readme]
    assert not missing
