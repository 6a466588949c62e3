"""Write requirements/base.txt and test.txt: exact versions of everything that one environment holds.

Run it with the interpreter of the environment whose versions are to be kept, after testing them there:
``.venv/bin/python tools/lock.py``. What goes into which file follows from pyproject.toml: its dependencies
and an extra, and all that these need in turn.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRA_OF = {"base": "demo", "test": "dev"}
TITLE = {
    "base": "what the command line, training on local JSON and CSV, and the demo need",
    "test": "what the tests, the checks and the benchmarks need beyond base.txt",
}


def closure(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Canonical name -> exact version of the requirements and all that they need on this platform.

    A requirement's own marker ("only on Linux") is kept behind its version.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    asked = list(requirements)
    waiting = list(asked)
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        dist = metadata.distribution(name)
        found[name] = dist.version.partition("+")[0]
        for line in dist.requires or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append(need)
    for wanted in asked:
        if wanted.marker is not None:
            found[canonicalize_name(wanted.name)] += f"; {wanted.marker}"
    return found


def of_project(project: dict, extra: str) -> list[Requirement]:
    """The project's own dependencies and those of one extra, with extras that name extras opened."""
    lines = [*project["dependencies"], *project["optional-dependencies"][extra]]
    opened: list[Requirement] = []
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            for inner in sorted(requirement.extras):
                opened += of_project(project, inner)
        else:
            opened.append(requirement)
    return opened


def main() -> None:
    """Write both files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked: dict[str, dict[str, str]] = {
        name: closure(of_project(project, extra)) for name, extra in EXTRA_OF.items()
    }
    for name, pins in locked.items():
        lines = [f"# {TITLE[name]}; written by tools/lock.py, exact versions of all that is needed in turn"]
        if name == "test":
            lines.append("-r base.txt")
            pins = {key: version for key, version in pins.items() if key not in locked["base"]}
        lines += [f"{key}=={version}" for key, version in sorted(pins.items())]
        (ROOT / "requirements" / f"{name}.txt").write_text("\n".join(lines) + "\n")
        print(f"requirements/{name}.txt: {len(pins)} packages")


if __name__ == "__main__":
    main()
