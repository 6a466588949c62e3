"""Run docs/tutorial.md from top to bottom, every command in a terminal, and draw its pictures.

Comments before a block of commands say what belongs to it:

    <!-- picture: NAME -->    the screen becomes docs/images/tutorial-NAME.png
    <!-- typed: LINE -->      a line typed once the command asks for one
    <!-- short: FLAGS -->     added where the page is run in its short form, as the tests do
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from terminal import INK, PROMPT, Screen, Style, draw, run

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
PICTURES = ROOT / "docs" / "images"
_BLOCK = re.compile(r"(?P<said>(?:^<!-- .*? -->\n)*)^```bash\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Step:
    """One command of the page."""

    line: str
    picture: str | None
    typed: tuple[str, ...]
    short: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """What the shell makes of it."""
        return shlex.split(self.line.replace("\\\n", ""))


def steps(page: Path = PAGE) -> list[Step]:
    """The commands of the page, in order."""
    found = []
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        said = re.findall(r"^<!-- (picture|typed|short): (.*) -->$", block["said"], re.M)
        known = {key: [text for name, text in said if name == key] for key in ("picture", "typed", "short")}
        short = tuple(shlex.split(" ".join(known["short"])))
        picture = known["picture"][0] if known["picture"] else None
        found.append(Step(block["code"].strip(), picture, tuple(known["typed"]), short))
    return found


def perform(step: Step, work: Path, short: bool, pictures: Path | None) -> int:
    """Run one command of the page; its exit code."""
    print(f"\n$ {step.line}", flush=True)
    words = [*step.words, *(step.short if short else ())]
    if words[0] == "veneer":
        command = [sys.executable, "-m", "veneer", *words[1:]]
    else:  # python, and a program of the repository
        command = [sys.executable, str(ROOT / words[1]), *words[2:]]
    done = run(command, work, step.typed, show=lambda piece: print(piece, end="", flush=True))
    print(f"\n  [{done.seconds:.0f} s, exit {done.code}]", flush=True)
    if step.picture and pictures is not None and done.code == 0:
        screen = Screen()
        for number, line in enumerate(step.line.split("\n")):
            screen.style = Style(PROMPT, bold=True)
            screen.feed("> " if number else "$ ")
            screen.style = Style(INK, bold=True)
            screen.feed(line.strip() + "\r\n" if number else line + "\r\n")
        screen.style = Style()
        screen.feed(done.raw.replace(str(work), "~"))
        draw(screen, pictures / f"tutorial-{step.picture}.png", " ".join(words[:2]))
    return done.code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="with the flags of the short form")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where the pictures go")
    parser.add_argument("--work", type=Path, help="an empty directory to work in, which stays")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="veneer-tutorial-"))
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONPATH", str(ROOT / "src"))
    begun = time.monotonic()
    try:
        for step in steps():
            if perform(step, work, given.short, given.pictures):
                print(f"FAILED: {step.line}", file=sys.stderr)
                return 1
        shutil.copy(work / "updates.png", given.pictures / "tutorial-updates.png")
    finally:
        if given.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(f"\nThe tutorial took {time.monotonic() - begun:.0f} s; its pictures are in {given.pictures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
