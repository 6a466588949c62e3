"""Archives of adapters, and archives that are no such thing."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest

from veneer.errors import AdapterFileError
from veneer.files import archive
from veneer.files.archive import is_archive, unpacked

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def packed(place: Path, *entries: str | tarfile.TarInfo, mode: str = "w") -> Path:
    """An archive of files that hold their own names, and of other entries."""
    path = place / "run.tar"
    with tarfile.open(path, mode) as made:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                made.addfile(entry)
            else:
                info = tarfile.TarInfo(entry)
                info.size = len(entry)
                made.addfile(info, io.BytesIO(entry.encode()))
    return path


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, CONFIG
    return info


@pytest.mark.parametrize("folder", ["", "./", "run/final/"])
def test_the_two_files_are_unpacked_and_nothing_else(folder: str, tmp_path: Path) -> None:
    names = [f"{folder}{CONFIG}", f"{folder}{TENSORS}"]
    path = packed(tmp_path, special("./", tarfile.DIRTYPE), *names, "checkpoint_complete", "x/optimizer.pt")
    assert is_archive(path) and not is_archive(tmp_path)
    with unpacked(path) as place:
        assert place.name == "run"
        found = {file.name: file.read_text() for file in place.iterdir()}
    assert found == {CONFIG: names[0], TENSORS: names[1]} and not place.parent.exists()


REFUSED: dict[str, tuple[str | tarfile.TarInfo, ...]] = {
    "'/etc/x' leads out": (CONFIG, TENSORS, "/etc/x"),
    "'../x' leads out": (CONFIG, TENSORS, "../x"),
    r"'..\\x' leads out": (CONFIG, TENSORS, "..\\x"),
    f"'{TENSORS}' is a link": (CONFIG, special(TENSORS, tarfile.SYMTYPE)),
    "'hard' is a link": (CONFIG, TENSORS, special("hard", tarfile.LNKTYPE)),
    "'pipe' is a link, a device": (CONFIG, TENSORS, special("pipe", tarfile.FIFOTYPE)),
    f"'{CONFIG}' is there twice": (CONFIG, TENSORS, CONFIG),
    f"it has no {TENSORS}": (CONFIG, f"inside/{TENSORS}"),
    f"it has 0 files {CONFIG}": (TENSORS,),
    f"it has 2 files {CONFIG}": (CONFIG, TENSORS, f"inside/{CONFIG}"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason: str, tmp_path: Path) -> None:
    path = packed(tmp_path, *REFUSED[reason])
    with pytest.raises(AdapterFileError, match=re.escape(reason)), unpacked(path):
        pass


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = packed(tmp_path, "/a", "../b", special("c", tarfile.SYMTYPE))
    with pytest.raises(AdapterFileError) as error, unpacked(path):
        pass
    assert str(error.value).count("\n  - ") == 4


def test_compressed_damaged_and_endless_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packed(tmp_path, CONFIG, TENSORS).read_bytes()
    path = packed(tmp_path, CONFIG, TENSORS, mode="w:gz")
    with pytest.raises(AdapterFileError, match="damaged, or compressed"), unpacked(path):
        pass
    path.write_bytes(whole[: 2 * 512 + 512 + 5])  # the second file ends in its first bytes
    with pytest.raises(AdapterFileError, match="damaged, or compressed"), unpacked(path):
        pass
    path.write_bytes(whole)
    monkeypatch.setattr(archive, "MAX_ENTRIES", 1)
    with pytest.raises(AdapterFileError, match="more than 1 entries"), unpacked(path):
        pass
