"""Make a second environment that lacks PEFT: ``.venv/bin/python tools/make_nopeft_env.py``.

It is a virtual environment whose site-packages holds a link to every entry of the current one's, except
peft's: nothing is downloaded, it takes no disk space, and there `import peft` fails, `find_spec("peft")`
is None and `importlib.metadata` does not know it either. Its path is printed. Made anew when what it
mirrors has changed; made aside and moved into place, so that concurrent callers do no harm.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("peft",)


def mirrored(site: Path) -> list[Path]:
    """The entries of a site-packages that are to be seen through the mirror."""
    entries = []
    for entry in sorted(site.iterdir()):
        name = entry.name.lower()
        if entry.name == "__pycache__" or any(name == out or name.startswith(f"{out}-") for out in LEFT_OUT):
            continue
        entries.append(entry)
    return entries


def key_of(entries: list[Path]) -> str:
    """Changes when the interpreter or the list of entries does."""
    words = "\n".join([sys.base_prefix, sys.version, *map(str, entries)])
    return hashlib.sha256(words.encode()).hexdigest()


def make(target: Path) -> Path:
    """Make the environment at `target` unless it is there and current; returns its interpreter."""
    entries = mirrored(Path(sysconfig.get_path("purelib")))
    python = target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = target / "mirror-of"
    if python.exists() and stamp.is_file() and stamp.read_text() == key_of(entries):
        return python
    fresh = target.with_name(f"{target.name}.part{os.getpid()}")
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(fresh)
    site = Path(
        sysconfig.get_path("purelib", scheme="venv", vars={"base": str(fresh), "platbase": str(fresh)})
    )
    for entry in entries:
        (site / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    (fresh / stamp.name).write_text(key_of(entries))
    old = target.with_name(f"{target.name}.old{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        # Somebody else put an equal one there first.
        if not python.exists():
            raise
    if old.is_symlink():  # where it stood was a link: the environment that it leads to is another's
        old.unlink()
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    return python


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / ".venv-nopeft"))
