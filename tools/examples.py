"""Run the examples, two at a time: ``python tools/examples.py [NAME …] [--short]``.

``--pages`` runs nothing: it writes what the last full runs printed into docs/guides, and their pictures into
docs/images.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER, GUIDES, IMAGES = ROOT / "examples", ROOT / "docs" / "guides", ROOT / "docs" / "images"
#: CPU seconds of a full run from which on it is begun only where it is named.
LONG = 1800
BEGIN, END = "<!-- printed by the example: python tools/examples.py --pages -->", "<!-- end -->"


def names() -> list[str]:
    """The files of examples/ that can be run; the others are what they share."""
    files = sorted(FOLDER.glob("*.py"))
    return [file.stem for file in files if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]


def cost(name: str) -> int:
    """CPU seconds of the full run that the guide shows; 0 where it shows none."""
    page = GUIDES / f"{name}.md"
    found = re.search(r"(\d+) CPU seconds;", page.read_text(encoding="utf-8")) if page.is_file() else None
    return int(found[1]) if found else 0


def run(name: str, short: bool, jobs: int) -> bool:
    """Run one example of as many at a time, with its share of the cores; whether its claims held."""
    print(f"== {name}: begun", flush=True)
    start = time.perf_counter()
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **os.environ}
    command = [sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py"), *(["--short"] if short else [])]
    done = subprocess.run(
        command,
        env={**environment, "TOKENIZERS_PARALLELISM": "false"},
        cwd=ROOT,
        stdout=None if jobs == 1 else subprocess.PIPE,
        stderr=None if jobs == 1 else subprocess.STDOUT,
    )
    took = time.perf_counter() - start
    said = (done.stdout or b"").decode(errors="replace")
    print(f"{said}== {name}: {'done' if done.returncode == 0 else 'FAILED'} in {took:.0f} s\n", flush=True)
    return done.returncode == 0


def about(page: Path) -> str:
    """The heading of a guide."""
    return page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def write_page(name: str) -> bool:
    """Put what the last full run printed between the marks of the guide; whether there was one."""
    results, page = FOLDER / "results" / name, GUIDES / f"{name}.md"
    printed = results / f"{name}.txt"
    if not printed.is_file() or not page.is_file():
        return False
    text = printed.read_text(encoding="utf-8").rstrip()
    if "\nshort form, " in text:
        return False
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    before, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    pictures = sorted(results.glob("*.png"))
    shown = "".join(f"\n![{about(page)}](../images/guide-{picture.name})\n" for picture in pictures)
    made = f"{BEGIN}\n```text\n{lines}\n```\n{shown}{END}"
    page.write_text(before + made + rest.split(END, 1)[1], encoding="utf-8")
    for picture in pictures:
        shutil.copy(picture, IMAGES / f"guide-{picture.name}")
    return True


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of: {', '.join(names())} (all but long ones)"
    )
    parser.add_argument("--short", action="store_true", help="the short form of each")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    parser.add_argument("--pages", action="store_true", help="only write the last results into the guides")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"no such example: {', '.join(unknown)}; there are {', '.join(names())}")
    # The longest first: a long one begun last would have the other cores wait for it.
    short = [name for name in names() if options.short or options.pages or cost(name) < LONG]
    wanted = sorted(options.names or short, key=cost, reverse=True)
    if options.pages:
        for name in wanted:
            print(f"{name}: {'written' if write_page(name) else 'no full run to write, or no page'}")
        return 0
    start = time.perf_counter()
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        try:
            held = list(pool.map(lambda name: run(name, options.short, max(1, options.jobs)), wanted))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    failed = [name for name, well in zip(wanted, held, strict=True) if not well]
    print(f"== all: {len(wanted)} examples in {(time.perf_counter() - start) / 60:.1f} min")
    if failed:
        print(f"\nFailed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
