"""Directories for results appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import VeneerError
from veneer.checkpoint.places import check_replaceable, check_room, replacing


def test_it_appears_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "a" / "b") as made:
        (made / "model.safetensors").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), replacing(tmp_path / "a" / "b") as made:
        (made / "model.safetensors").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "a"
    place.mkdir()
    (place / "model.safetensors").write_text("old")
    with pytest.raises(OSError), replacing(place, overwrite=True) as made:
        (made / "model.safetensors").write_text("half")
        raise OSError
    assert (place / "model.safetensors").read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_the_weights_of_another_layout_do_not_stay(tmp_path: Path) -> None:
    old = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "notes.txt",
    ]
    for name in old:
        (tmp_path / name).write_text("old")
    with replacing(tmp_path, overwrite=True) as made:
        (made / "model.safetensors").write_text("new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "notes.txt"]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, said in ((tmp_path / "file", "is a file"), (tmp_path, "not empty")):
        with pytest.raises(VeneerError, match=said):
            check_replaceable(place)
    with pytest.raises(VeneerError, match="no directory that can be written"):
        check_replaceable(tmp_path / "file" / "below")
    check_replaceable(tmp_path, overwrite=True)
    check_replaceable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    check_room(tmp_path / "new", 1)
    with pytest.raises(VeneerError, match="will take 1,000,000,000,000 MB, and its disk has"):
        check_room(tmp_path / "new", 10**18)
