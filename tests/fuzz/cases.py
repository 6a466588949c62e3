"""One broken input through one door, in a process of its own: what came of it, and what it left."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.fuzz.doors import DOORS, Door, Inputs
from tests.fuzz.inputs import KINDS
from tests.kills import ended, forked, watch
from veneer import VeneerError

#: Seconds of computing, and seconds that a reader may wait for something that never comes.
SECONDS, PATIENCE = 10, 40
#: Memory beyond that of the files, in bytes.
MEMORY = 2**30
#: Characters of a message.
LONGEST = 5000


class Case(NamedTuple):
    """A broken input and a door; the same numbers make the same case.

    Attributes:
        seed: Of the run.
        number: Within the run.
        kind: What is broken, of `KINDS` or `DISKS`.
        of: The good input that it is made of.
        door: Of `DOORS`.
    """

    seed: int
    number: int
    kind: str
    of: str
    door: str

    @property
    def random(self) -> Random:
        return Random(f"{self.seed} {self.number} {self.kind}")


class Outcome(NamedTuple):
    """What came of a case.

    Attributes:
        word: ``done``, ``refused`` or ``failed``.
        detail: The class of the error, or what is wrong.
    """

    word: str
    detail: str


def drawn(seed: int, number: int, doors: Mapping[str, Door] = DOORS) -> Case:
    """The case of a number."""
    random = Random(f"{seed} {number}")
    found: list[tuple[str, str, float]] = []
    while not found:
        kind = random.choice([*KINDS, *DISKS])
        found = [
            (of, name, door.weight)
            for name, door in doors.items()
            if _meets(door, kind)
            for of in (door.of if kind in KINDS else door.of[:1]) or ("",)
            if kind in DISKS or of in KINDS[kind].of
        ]
    ((of, name, _),) = random.choices(found, [weight for *_, weight in found])
    return Case(seed, number, kind, of, name)


def _meets(door: Door, kind: str) -> bool:
    return kind in KINDS or (bool(door.of) if kind in _READ else door.writes)


def tried(case: Case, good: Path, place: Path) -> Outcome:
    """Try a case in a process of its own.

    Args:
        case: What to try.
        good: The good inputs.
        place: A new directory: ``here`` is where the reader works, beside it what it printed.
    """
    place.mkdir()
    reading, writing = os.pipe()
    child = forked(lambda: os.write(writing, json.dumps(_tried(case, good, place)).encode()))
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        raw = told.read()
    status = ended(child)
    if raw:
        return Outcome(*json.loads(raw))
    if -status in (signal.SIGXCPU, signal.SIGALRM):
        return Outcome(
            "failed", f"more than {SECONDS} s" if -status == signal.SIGXCPU else "it waits for ever"
        )
    return Outcome("failed", f"the process ended with {status}: see {place / 'stderr'}")


def _tried(case: Case, good: Path, place: Path) -> tuple[str, str]:
    here = place / "here"
    here.mkdir()
    given = here / "given"
    if case.of:
        shutil.copytree(good / case.of, given)
    else:
        given = good / "adapter"
    os.chdir(here)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
    (place / "stdin").write_text("hello\n")
    os.dup2(os.open(place / "stdin", os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    (here / "tmp").mkdir()
    tempfile.tempdir = str(here / "tmp")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place / "compiled")  # made where torch is imported
    if case.kind in KINDS:
        KINDS[case.kind].spoil(given, case.random)
    before = content(here)
    _limit(here)
    if case.kind in DISKS:
        DISKS[case.kind](here, case.random)
    door, output = DOORS[case.door], here / "output"
    found = _entered(door, Inputs(good, given, output))
    for bound in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
        resource.setrlimit(bound, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    global _bad
    _bad = False
    after = content(here)
    if door.leaves is not None and output.exists():
        try:
            door.leaves(output)
        except BaseException as error:
            traceback.print_exc()
            return "failed", f"{found.word}, and left {sorted(after)}: {type(error).__name__} {error}"[:400]
    if door.leaves is not None or (found.word == "done" and door.writes):
        after = {path: what for path, what in after.items() if path.partition("/")[0] != "output"}
    left = [path for path in {*before, *after} if before.get(path) != after.get(path)]
    if found.word != "failed" and left:
        return "failed", f"{found.word}, and changed {', '.join(sorted(left)[:5])}"
    return found


def _limit(here: Path) -> None:
    """Bound what this process may take from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    files = sum(path.stat().st_size for path in here.rglob("*") if path.is_file() and not path.is_symlink())
    most = pages * resource.getpagesize() + files + MEMORY
    hard = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)


def _entered(door: Door, inputs: Inputs) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = door.enter(inputs)
    except VeneerError as error:
        if len(str(error)) > LONGEST + 2 * len(str(inputs.given)):
            return Outcome("failed", f"a message of {len(str(error)):,} characters")
        return Outcome("refused", type(error).__name__)
    except BaseException as error:
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {str(error)[:200]}")
    if not isinstance(code, int):
        return Outcome("done", "")
    sys.stdout.flush()
    sys.stderr.flush()
    return _of_command(code, Path("/proc/self/fd/2").resolve().read_text(errors="replace"))


def _of_command(code: int, said: str) -> Outcome:
    wrong = re.search(r"^(Traceback .*|error: (unexpected|out of memory).*)", said, re.M)
    errors = len(re.findall(r"^error: ", said, re.M))
    if wrong or errors > 1 or code not in (0, 1, 2):
        return Outcome("failed", f"exit code {code}: {wrong[0] if wrong else said[-300:]}"[:400])
    if len(said) > 2 * LONGEST:
        return Outcome("failed", f"{len(said):,} characters of messages")
    return Outcome("refused", f"exit code {code}") if code else Outcome("done", "")


def content(place: Path) -> dict[str, tuple[object, ...]]:
    """What lies below a directory, without opening what is no file."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, inside, files in os.walk(place):
        for name in (*inside, *files):
            path = Path(folder) / name
            status = path.lstat()
            what: object = None
            if stat.S_ISREG(status.st_mode):
                what = path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                what = os.readlink(path)
            found[path.relative_to(place).as_posix()] = (status.st_mode, what)
    return found


#: Whether the disk is still as a case has made it: what watches a process cannot be taken away again.
_bad = True


def _failing(place: Path, number: int, fails: Callable[[int, str], bool], reads: bool = False) -> None:
    """Steps on files below a place fail with an error of the system."""

    def refuse(step: int, call: str) -> None:
        if _bad and fails(step, call):
            raise OSError(number, os.strerror(number))

    watch(place, refuse, reads)


def _full_at_a_step(place: Path, random: Random) -> None:
    """From some step on nothing new can be made."""
    first = random.randint(1, random.choice((12, 60)))
    makes = ("open", "os.mkdir", "os.fsync", "os.link", "os.symlink")
    _failing(place, errno.ENOSPC, lambda step, call: step >= first and call in makes)


def _full_at_a_size(place: Path, random: Random) -> None:
    """No file can grow beyond a size; this is seen by code that is not Python too."""
    size = random.choice((8_000, 12_000, 20_000, 50_000, 100_000))  # beyond what is printed
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _read_only(place: Path, random: Random) -> None:
    """Nothing can be changed."""
    _failing(place, errno.EROFS, lambda step, call: True)


def _failing_once(place: Path, random: Random) -> None:
    """One step fails, and the steps that mend it do not."""
    at = random.randint(1, random.choice((12, 60)))
    _failing(place, errno.EIO, lambda step, call: step == at)


def _unreadable(place: Path, random: Random) -> None:
    """From some step on no file of the input can be opened."""
    first = random.randint(1, 20)
    _failing(place / "given", errno.EIO, lambda step, call: step >= first, reads=True)


#: What is wrong with the disk that is read and written.
DISKS: dict[str, Callable[[Path, Random], None]] = {
    "disk full at a step": _full_at_a_step,
    "disk full at a size": _full_at_a_size,
    "disk read-only": _read_only,
    "disk fails once": _failing_once,
    "disk unreadable": _unreadable,
}
#: Those that doors meet that only read.
_READ = {"disk unreadable"}
