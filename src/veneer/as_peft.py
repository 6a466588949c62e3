"""Put Veneer in the place of peft, for libraries that import peft themselves.

Call `register_as_peft()` to do so in this process, or run an unchanged script with
`python -m veneer.as_peft script.py`. After `python -m veneer.as_peft install` the environment variable
`VENEER_AS_PEFT=1` does the same, also in child processes (`accelerate launch`, `torchrun`, data loaders).
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from veneer.atomic import atomic_file
from veneer_as_peft import register_as_peft

__all__ = ["install", "main", "register_as_peft", "uninstall"]

ENVIRONMENT = "VENEER_AS_PEFT"
PTH_NAME = "veneer_as_peft.pth"
PTH_LINE = (
    f"import os; os.environ.get({ENVIRONMENT!r}) == '1' and __import__('veneer_as_peft').register_as_peft()\n"
)
USAGE = """\
usage: python -m veneer.as_peft script.py [arguments]   run a script whose `import peft` gives Veneer
       python -m veneer.as_peft -m module [arguments]   the same for a module
       python -m veneer.as_peft install                 let VENEER_AS_PEFT=1 do so in every process of this
                                                        Python, child processes included
       python -m veneer.as_peft uninstall               take that back"""


def _pth_file() -> Path:
    return Path(sysconfig.get_path("purelib")) / PTH_NAME


def install() -> Path:
    """Write the `.pth` file that obeys `VENEER_AS_PEFT=1` into this Python's site-packages, and return it.

    The file is written atomically, and may be written again.

    Raises:
        OSError: The directory cannot be written.
    """
    target = _pth_file()
    with atomic_file(target) as waiting:  # a starting interpreter must not read an incomplete line
        waiting.write_text(PTH_LINE, encoding="utf-8")
    return target


def uninstall() -> Path | None:
    """Remove the file that `install` wrote; None if there is none.

    Raises:
        OSError: The file cannot be removed.
    """
    target = _pth_file()
    try:
        target.unlink()
    except FileNotFoundError:
        return None
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m veneer.as_peft`; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if words[:1] in (["install"], ["uninstall"]):
        return _write_or_remove(words)
    if not words or words == ["-m"] or (words[0].startswith("-") and words[0] != "-m"):
        return _failed(f"no such option: {words[0]}\n{USAGE}" if words and words != ["-m"] else USAGE)
    return _run(words)


def _failed(why: str, status: int = 2) -> int:
    print(why, file=sys.stderr)
    return status


def _write_or_remove(words: list[str]) -> int:
    command, rest = words[0], words[1:]
    if rest:
        return _failed(
            f"{command} takes no arguments, got {' '.join(rest)}; a script of that name is ./{command}"
        )
    try:
        file = install() if command == "install" else uninstall()
    except OSError as error:
        return _failed(
            f"cannot {'write' if command == 'install' else 'remove'} {_pth_file()}: {error.strerror}; "
            "nothing was changed. The directory is that of the Python that runs this: use a virtual "
            "environment, or ask whoever may write there. Without it, `python -m veneer.as_peft script.py` "
            "serves one process, and a child process can call veneer.as_peft.register_as_peft() itself.",
            status=1,
        )
    if command == "install":
        print(f"wrote {file}: with {ENVIRONMENT}=1 set, `import peft` gives Veneer in this Python")
    else:
        print(f"removed {file}" if file else f"nothing to remove: there is no {_pth_file()}")
    return 0


def _why_not_runnable(words: list[str]) -> str | None:
    """Why the script or module cannot be run, or None."""
    if words[0] != "-m":
        return None if os.path.exists(words[0]) else f"there is no script {words[0]!r}"
    try:
        found = importlib.util.find_spec(words[1])
    except ImportError as error:
        return f"there is no module {words[1]!r}: {error}"
    return None if found is not None else f"there is no module {words[1]!r}"


def _run(words: list[str]) -> int:
    """Run a script or a module as the main program, with Veneer in the place of peft."""
    register_as_peft()
    # Looking a module up imports its package.
    if missing := _why_not_runnable(words):
        return _failed(missing)
    # Child processes obey this where `install` has been run.
    os.environ[ENVIRONMENT] = "1"
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return 0
    sys.argv = words
    if not getattr(sys.flags, "safe_path", False) and sys.path:
        sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
