"""A file is written whole or not at all, under a name that nobody could guess."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.processes import run_python
from veneer.atomic import atomic_file
from veneer.calibration.measuring import store
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


def test_of_two_nested_files_the_inner_one_is_moved_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with atomic_file(tmp_path / "outer") as outer:
        outer.write_text("1")
        with atomic_file(tmp_path / "inner") as inner:
            inner.write_text("2")
            assert names(tmp_path) == sorted([outer.name, inner.name])
    assert moved == ["inner", "outer"]


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
