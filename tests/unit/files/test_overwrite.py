"""Directories for results appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest

from tests.processes import run_python
from veneer import LoraConfig, VeneerError
from veneer.files.overwrite import check_replaceable, check_room, replacing

ROOT = Path(__file__).parents[3]


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


def made_by(place: Path) -> dict[str, str]:
    return {
        path.relative_to(place).as_posix(): path.read_text() for path in place.rglob("*") if path.is_file()
    }


OTHERS = {"notes.txt": "mine", "logs/today.txt": "mine", "sub/mine.txt": "mine"}
OLD = {
    **{f"model-0000{n}-of-00003.safetensors": "old" for n in (1, 2, 3)},
    "model.safetensors.index.json": "old",
    "config.json": "old",
    "sub/config.json": "old",
}
NEW = {
    **{f"model-0000{n}-of-00003.safetensors": "new" for n in (1, 2, 3)},
    "model.safetensors.index.json": "new",
    "config.json": "new",
    "tokenizer.json": "new",
    "sub/config.json": "new",
}

KILLING = """
import json, sys
from functools import partial
from pathlib import Path
from tests.kills import killed_at, steps_of
from veneer.files.overwrite import replacing

root, old, new = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])


def write(place, files):
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


def replace(place):
    with replacing(place, overwrite=True) as made:
        write(made, new)


write(root / "0" / "out", old)
count = steps_of(partial(replace, root / "0" / "out"), root / "0")
for step in range(1, count + 1):
    write(root / str(step) / "out", old)
    killed_at(step, partial(replace, root / str(step) / "out"), root / str(step))
print(count)
"""


def test_killed_at_any_step_it_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    old = {**OLD, **OTHERS}
    done = run_python(KILLING, tmp_path, json.dumps(old), json.dumps(NEW), cwd=ROOT)
    whole = [old, {**NEW, **OTHERS}]
    assert made_by(tmp_path / "0" / "out") == whole[1]
    count, gone = int(done.stdout), 0
    assert count > 20
    for step in range(1, count + 1):
        out = tmp_path / str(step) / "out"
        if out.exists():
            assert made_by(out) in whole, step
        else:
            gone += 1
            (left,) = (path for path in out.parent.iterdir())
            assert left.name.startswith(".out.") and [made_by(left / n) for n in ("old", "new")] == whole
        check_replaceable(out, overwrite=True)
        assert list(out.parent.iterdir()) == [out], "the next run tidies"
        assert made_by(out) in whole
        with replacing(out, overwrite=True) as made:
            (made / "model.safetensors").write_text("third")
        assert made_by(out).keys() >= {"model.safetensors", *OTHERS} and list(out.parent.iterdir()) == [out]
    assert gone == 1, "between the two renames"


def test_a_run_that_is_at_work_is_not_tidied_away(tmp_path: Path) -> None:
    with replacing(tmp_path / "out") as made:
        (made / "model.safetensors").write_text("first")
        check_replaceable(tmp_path / "out")
        assert (made / "model.safetensors").read_text() == "first"
        with replacing(tmp_path / "out-2") as other:
            (other / "model.safetensors").write_text("second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]


def test_what_appeared_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(VeneerError, match="not empty"), replacing(tmp_path / "out") as made:
        (made / "model.safetensors").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors").write_text("somebody's")
    assert made_by(tmp_path) == {"out/model.safetensors": "somebody's"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_rename_that_fails_brings_the_old_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError(number, os.strerror(number))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with (
        pytest.raises(VeneerError, match=rf"nothing has changed: .*{os.strerror(number)}"),
        replacing(tmp_path / "out", True) as made,
    ):
        (made / "model.safetensors").write_text("new")
    assert made_by(tmp_path) == {"out/model.safetensors": "old"}


def test_files_have_the_permissions_of_the_umask_and_others_keep_theirs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "mine.txt").chmod(0o600)
    out.chmod(0o750)
    (tmp_path / "ordinary").touch()
    with replacing(out, overwrite=True) as made:
        (made / "sub").mkdir()
        for name in ("model.safetensors", "sub/config.json"):
            (made / name).write_text("new")
            (made / name).chmod(0o600)  # as safetensors does
    modes = {p.relative_to(out).as_posix(): p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()}
    ordinary = (tmp_path / "ordinary").stat().st_mode & 0o777
    assert modes == {"model.safetensors": ordinary, "sub/config.json": ordinary, "mine.txt": 0o600}
    assert out.stat().st_mode & 0o777 == 0o750


def test_links_stay_links(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "elsewhere").write_text("precious")
    (real / "link").symlink_to("../elsewhere")
    (tmp_path / "out").symlink_to(real)
    with replacing(tmp_path / "out", overwrite=True) as made:
        (made / "model.safetensors").write_text("new")
    assert (tmp_path / "out").is_symlink() and (real / "model.safetensors").read_text() == "new"
    assert (real / "link").is_symlink() and (real / "link").read_text() == "precious"


def test_what_cannot_be_replaced_as_a_whole_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(VeneerError, match="mount point"):
        check_replaceable(tmp_path / "mounted")

    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    (tmp_path / "inside").mkdir()
    with pytest.raises(VeneerError, match=f"cannot write to the directory {tmp_path}"):
        check_replaceable(tmp_path / "inside")


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VeneerError, match="not empty"):
        check_replaceable(tmp_path)
    for place in (tmp_path / "file", tmp_path / "pipe"):
        with pytest.raises(VeneerError, match="is a file"):
            check_replaceable(place, overwrite=True)
        with pytest.raises(VeneerError, match="it is a file"):
            LoraConfig().save_pretrained(place)
    with pytest.raises(VeneerError, match="Not a directory"):
        check_replaceable(tmp_path / "file" / "below")
    check_replaceable(tmp_path, overwrite=True)
    check_replaceable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    check_room(tmp_path / "new", 1)
    with pytest.raises(VeneerError, match="will take 1,000,000,000,000 MB, and its disk has"):
        check_room(tmp_path / "new", 10**18)
