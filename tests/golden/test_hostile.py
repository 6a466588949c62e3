"""Files from elsewhere are hostile until proven otherwise: made here, at run time, from a good one."""

from __future__ import annotations

import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fuzz.files import Bomb, parts, put
from veneer.errors import AdapterFileError
from veneer.files.layout import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from veneer.files.read import open_adapter
from veneer.files.write import write_adapter
from veneer.training.adapters import own_tokenizer
from veneer.training.saved_adapter import read_adapter

TENSORS = {f"m.{i}.lora_{x}.weight": torch.full((4, 4), float(i)) for i in range(3) for x in "AB"}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_adapter(tmp_path, TENSORS, {"peft_type": "LORA", "r": 4}, metadata={"veneer": "{}"})
    return tmp_path / SAFETENSORS_NAME


def test_the_same_bytes_put_together_again_are_good(good: Path) -> None:
    put(good, *parts(good))
    assert all(torch.equal(t, TENSORS[k]) for k, t in open_adapter(good.parent).tensors().items())


def test_truncated_anywhere(good: Path) -> None:
    raw = good.read_bytes()
    for length in range(0, len(raw), 7):
        good.write_bytes(raw[:length])
        with pytest.raises(AdapterFileError, match=r"truncated|damaged"):
            open_adapter(good.parent)
    good.write_bytes(raw + b"x")
    with pytest.raises(AdapterFileError, match="damaged: its tensors take 384 bytes, the file holds 385"):
        open_adapter(good.parent)


def test_every_flipped_bit_of_the_header_is_an_error_or_another_valid_header(good: Path) -> None:
    raw = bytearray(good.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    refused = 0
    for at in range(8 + length):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << random.Random(at).randrange(8)
        good.write_bytes(flipped)
        try:
            tensors = open_adapter(good.parent).tensors()
        except AdapterFileError:
            refused += 1
        else:  # a letter of a name, of the metadata, or another dtype of the same size
            assert sum(t.numel() * t.element_size() for t in tensors.values()) == 384
    assert refused > length / 2


def change(name: str, **fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


FIRST, SECOND = "m.0.lora_A.weight", "m.0.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (change(FIRST, shape=[2**31, 2**31]), "needs 18,446,744,073,709,551,616 bytes"),
        (change(FIRST, shape=[2**62, 0]), "needs 0 bytes"),
        (change(FIRST, shape=[-4, -4]), "not a list of sizes"),
        (change(FIRST, shape=[4.0, 4]), "not a list of sizes"),
        (change(FIRST, shape=[True, 16]), "not a list of sizes"),
        (change(FIRST, shape=[1] * 100 + [16]), "too many entries"),
        (change(FIRST, shape="44"), "not a list of sizes"),
        (change(FIRST, dtype="F128"), "dtype 'F128' is unknown"),
        (change(FIRST, dtype=["F32"]), "is unknown"),
        (change(FIRST, dtype="F" * 10_000), r"dtype 'F{70,80}\.\.\. is unknown"),
        (change(FIRST, dtype="F64"), r"needs 128 bytes, it has 64"),
        (change(FIRST, data_offsets=[0, 2**63]), "not a list of sizes"),
        (change(FIRST, data_offsets=[0]), "too many|wrong number"),
        (change(FIRST, data_offsets=[64, 0]), "it has -64"),
        (change(FIRST, data_offsets=[64, 128]), "overlaps|leaves a gap"),
        (change(FIRST, data_offsets=[2**40, 2**40 + 64]), "leaves a gap"),
        (lambda h: h.__setitem__(FIRST, 3), "lacks dtype"),
        (lambda h: h.__setitem__(FIRST, {"dtype": "F32"}), "lacks dtype"),
        (lambda h: h.pop(FIRST), "leaves a gap|file holds 384"),
        (lambda h: h.__setitem__("", h.pop(FIRST)), "non-empty string"),
        (lambda h: h.__setitem__("x\0", h.pop(FIRST)), "control character"),
        (lambda h: h.__setitem__("__metadata__", {"a": "\ud800"}), "is damaged.*hex escape"),
        (lambda h: h.__setitem__("__metadata__", {"a": 1}), "not a table of strings"),
        (lambda h: h.__setitem__("__metadata__", "pt"), "not a table of strings"),
    ],
)
def test_headers_that_lie(good: Path, edit: Callable[[dict[str, Any]], object], says: str) -> None:
    header, body = parts(good)
    edit(header)
    put(good, header, body)
    with pytest.raises(AdapterFileError, match=says):
        open_adapter(good.parent)


@pytest.mark.parametrize(
    "header",
    [b"", b"null", b"[]", b"{", b'{"a":1,"a":1}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000],
    ids=["empty", "null", "list", "open", "twice", "binary", "nested", "deep"],
)
def test_headers_that_are_none(good: Path, header: bytes) -> None:
    put(good, header, b"")
    with pytest.raises(AdapterFileError, match="damaged"):
        open_adapter(good.parent)


@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 100_000_001, 5000])
def test_header_lengths_beyond_the_file(good: Path, length: int) -> None:
    good.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(AdapterFileError, match=f"{length:,} bytes, the file has 10"):
        open_adapter(good.parent)


def test_a_pointer_of_git_lfs_is_named(good: Path) -> None:
    good.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(AdapterFileError, match="git lfs pull"):
        open_adapter(good.parent)


@pytest.mark.parametrize("where", ["value", "whole", "legacy"])
def test_pickles_that_run_code_are_refused(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"value": {"m.lora_A.weight": torch.ones(2, 2), "x": Bomb()}}.get(where, Bomb())
    torch.save(content, tmp_path / BIN_NAME, _use_new_zipfile_serialization=where != "legacy")
    with pytest.raises(AdapterFileError, match=r"could run foreign code; refused|before torch 1.6"):
        open_adapter(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / BIN_NAME).write_bytes(pickle.dumps({"m.lora_A.weight": [1.0]}))
    with pytest.raises(AdapterFileError, match=r"before torch 1.6"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"a": 1}, "a int, not a tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "a dict, not a tensor"),
        ({3: torch.ones(1)}, "non-empty string"),
        ({"a": torch.ones(3).to_sparse()}, "not a plain dense tensor"),
        ({"a": torch.empty(3, device="meta")}, "not a plain dense tensor"),
        ({"a": torch.ones(1).expand(2**20, 2**20)}, "needs more bytes than the file has"),
    ],
)
def test_pickles_that_hold_something_else(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / BIN_NAME)
    with pytest.raises(AdapterFileError, match=says):
        open_adapter(tmp_path)


def test_truncated_and_flipped_pickles(tmp_path: Path) -> None:
    file = tmp_path / BIN_NAME
    torch.save(TENSORS, file)
    raw = file.read_bytes()
    for length in range(0, len(raw) - 1, 97):
        file.write_bytes(raw[:length])
        with pytest.raises(AdapterFileError, match=r"truncated|damaged"):
            open_adapter(tmp_path)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as plain,
        zipfile.ZipFile(tmp_path / BIN_NAME, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with pytest.raises(AdapterFileError, match=r"not an archive that torch.save writes"):
        open_adapter(tmp_path)


def test_archives_of_something_else_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / BIN_NAME, "w") as archive:
        archive.writestr("letter.txt", "no tensors")
    with pytest.raises(AdapterFileError, match="is damaged: RuntimeError"):
        open_adapter(tmp_path)
    raw = bytearray((tmp_path / BIN_NAME).read_bytes())
    raw[raw.rindex(b"PK\x01\x02")] = 0
    (tmp_path / BIN_NAME).write_bytes(raw)
    with pytest.raises(AdapterFileError, match=r"is damaged: .*central directory"):
        open_adapter(tmp_path)


def test_a_pipe_in_place_of_the_configuration(good: Path) -> None:
    (good.parent / CONFIG_NAME).unlink()
    os.mkfifo(good.parent / CONFIG_NAME)
    with pytest.raises(AdapterFileError, match="it is a pipe, not a file"):
        open_adapter(good.parent)


@pytest.mark.parametrize(
    "strange", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"]
)
def test_what_is_no_file_beside_an_adapter(good: Path, strange: Callable[[Path], object]) -> None:
    strange(good.parent / "metrics.json")
    assert read_adapter(good.parent).noted("options") is None
    assert own_tokenizer(good.parent) is None
    (good.parent / "tokenizer_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"neither a file nor a directory: metrics\.json"):
        own_tokenizer(good.parent)


def test_a_damaged_tokenizer_beside_an_adapter(good: Path) -> None:
    (good.parent / "tokenizer_config.json").write_text('{"tokenizer_class": 3')
    with pytest.raises(AdapterFileError, match=r"the tokenizer beside the adapter .* is damaged"):
        own_tokenizer(good.parent)
