"""A file is written whole or not at all, under a name that nobody could guess."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.processes import run_python
from veneer import atomic
from veneer.atomic import HalfMovedError, atomic_file, atomic_files, locked
from veneer.calibration.measuring import store
from veneer.errors import VeneerWarning
from veneer.training.heat_map import heat_map
from veneer.training.plots import loss_picture
from veneer.training.resuming import write_json
from veneer.training.spectra import UpdateSpectrum


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_old_file_stays_until_the_new_one_is_done(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with atomic_file(tmp_path / "a") as waiting:
        waiting.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), atomic_file(tmp_path / "a") as waiting:
        waiting.write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, atomic_file(tmp_path / "none" / "a"):
        pass
    assert error.value.filename == str(tmp_path / "none" / "a")


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with atomic_file(tmp_path / "a") as waiting:
        waiting.write_text("new")
    assert not (tmp_path / "a").is_symlink() and (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_the_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with atomic_file(tmp_path / "a") as waiting:
        save_file({"t": torch.zeros(2)}, waiting)  # which makes a file that its owner alone may read
    assert mode(tmp_path / "a") == mode(tmp_path / "ordinary")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom veneer.atomic import atomic_file\n"
        "os.umask(0o027)\n"
        "with atomic_file(sys.argv[1]) as waiting:\n    waiting.write_text('x')\n"
    )
    run_python(code, tmp_path / "b")
    assert mode(tmp_path / "b") == 0o640


def test_several_files_are_moved_in_order_with_nothing_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, sync, unlink = os.replace, os.fsync, Path.unlink
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b).name), replace(a, b)))
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(
        Path, "unlink", lambda path, **how: (done.append(f"no {path.name}"), unlink(path, **how))
    )
    (tmp_path / "old").touch()
    with atomic_files(tmp_path / "b", tmp_path / "a", instead_of=tmp_path / "old") as waiting:
        for number, path in enumerate(waiting):
            path.write_text(str(number))
        assert names(tmp_path) == sorted(["old", *(path.name for path in waiting)])
    assert done == ["sync", "sync", "b", "no old", "a", "sync"]
    assert [(tmp_path / name).read_text() for name in "ba"] == ["0", "1"]


def test_a_failure_between_two_moves_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def only_b(source: Path, target: Path) -> None:
        if target.name == "a":
            raise PermissionError(1, "no", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_b)
    with pytest.raises(PermissionError), atomic_files(tmp_path / "b", tmp_path / "a"):
        pass
    assert names(tmp_path) == []  # nothing was there before
    (tmp_path / "b").touch()
    with pytest.raises(HalfMovedError) as error, atomic_files(tmp_path / "b", tmp_path / "a"):
        pass
    assert error.value.filename == str(tmp_path / "a") and names(tmp_path) == ["b"]
    with pytest.raises(PermissionError), atomic_files(tmp_path / "a", tmp_path / "b"):
        pass
    assert names(tmp_path) == ["b"]


def test_a_directory_that_is_not_synced_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    with (
        pytest.warns(VeneerWarning, match="are complete, but the disk did not confirm them .*Input/output"),
        atomic_files(tmp_path / "b", tmp_path / "a"),
    ):
        pass
    assert names(tmp_path) == ["a", "b"]


LOCKING = """
import sys, time
from veneer.atomic import locked
with locked(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""


def test_one_at_a_time_is_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "PATIENCE", 0.02)
    with locked(tmp_path):
        with pytest.raises(TimeoutError, match="another process"), locked(tmp_path):
            pass
        with locked(tmp_path.parent):
            pass
    other = subprocess.Popen([sys.executable, "-c", LOCKING, tmp_path], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "in\n"
    with pytest.raises(TimeoutError), locked(tmp_path):
        pass
    other.kill()
    other.communicate()
    with locked(tmp_path):  # the lock goes with the process
        pass


def write_cache(place: Path) -> None:
    store(place, {"t": torch.ones(2)})


def write_heat_map(place: Path) -> None:
    heat_map(place, [UpdateSpectrum("layers.0.up", 2, 1.0, (3, 4), (1.0, 0.5))], "Updates")


#: What writes a file, and the names beside it that it once wrote to, whatever lay there.
WRITERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "calibration": (write_cache, ["{}.tmp"]),
    "json": (lambda place: write_json(place, {"a": 1}), [".{}.part"]),
    "heat map": (write_heat_map, [".{}.tmp"]),
    "picture": (lambda place: loss_picture(place, [1.0, 0.5], "Loss"), ["{}"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_follows_a_link_that_somebody_laid(name: str, tmp_path: Path) -> None:
    write, once = WRITERS[name]
    place, victim = tmp_path / "out" / "file.png", tmp_path / "victim"
    place.parent.mkdir()
    victim.write_text("precious")
    for other in once:
        (place.parent / other.format(place.name)).symlink_to(victim)
    write(place)
    assert victim.read_text() == "precious"
    assert place.is_file() and not place.is_symlink()
    (place.parent / "ordinary").touch()
    assert mode(place) == mode(place.parent / "ordinary")


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_fails_leaves_the_old_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, _ = WRITERS[name]
    place = tmp_path / "file.png"
    place.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(place)
    assert place.read_text() == "old" and names(tmp_path) == ["file.png"]
