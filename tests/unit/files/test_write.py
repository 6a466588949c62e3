from __future__ import annotations

import errno
import json
import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.configurations import read_config
from veneer.errors import CheckpointError, VeneerWarning
from veneer.files.digest import DATA_DIGEST
from veneer.files.layout import BIN_NAME, CARD_NAME, CONFIG_NAME, SAFETENSORS_NAME, SAVED_CONFIG
from veneer.files.read import open_adapter
from veneer.files.write import NO_DIGEST, write_adapter, write_card

OLD = {"m.lora_A.weight": torch.zeros(4, 8), "m.lora_B.weight": torch.zeros(8, 4)}
NEW = {
    "m.lora_A.weight": torch.ones(2, 8),
    "m.lora_B.weight": torch.ones(8, 2),
    "n.lora_A.weight": torch.ones(2, 8),
}
OLD_CONFIG, NEW_CONFIG = {"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 64}


def content(directory: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What a reader sees."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is a pickle", VeneerWarning)
        file = open_adapter(directory)
    return read_config(directory), {k: t.tolist() for k, t in file.tensors().items()}


def lists(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {k: t.tolist() for k, t in tensors.items()}


def names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def test_what_is_written(tmp_path: Path) -> None:
    place = tmp_path / "new" / "adapter"
    write_adapter(
        place, OLD, {"target_modules": ["q"], **OLD_CONFIG}, metadata={"veneer": "{}"}, card="# Card\n"
    )
    assert names(place) == {CONFIG_NAME, SAFETENSORS_NAME, CARD_NAME}
    text = (place / CONFIG_NAME).read_text()
    assert text == json.dumps({"lora_alpha": 8, "r": 4, "target_modules": ["q"]}, indent=2) + "\n"
    assert (place / CARD_NAME).read_text() == "# Card\n"
    metadata = open_adapter(place).metadata
    assert metadata.pop(DATA_DIGEST) != NO_DIGEST
    assert metadata == {"format": "pt", "veneer": "{}", SAVED_CONFIG: text}
    assert content(place) == ({"target_modules": ["q"], **OLD_CONFIG}, lists(OLD))


def test_the_format_is_always_in_the_metadata(tmp_path: Path) -> None:
    write_adapter(tmp_path, OLD, {}, metadata={"format": "np"})
    metadata = open_adapter(tmp_path).metadata
    assert (metadata["format"], metadata[SAVED_CONFIG]) == ("pt", "{}\n")


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    written = set()
    for i in range(6):
        write_adapter(
            tmp_path / str(i), OLD, OLD_CONFIG, metadata={"veneer": "{}", "é": "1", "c": "\u2028", "b": '"'}
        )
        written.add((tmp_path / str(i) / SAFETENSORS_NAME).read_bytes())
    assert len(written) == 1
    assert open_adapter(tmp_path / "0").metadata["c"] == "\u2028"


def test_tied_viewed_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "a.lora_A.weight": base,
        "b.lora_A.weight": base,
        "c.lora_A.weight": base[1:3],
        "d.lora_B.weight": base.t(),
        "e.lora_B.weight": base[:1].expand(4, 6),
        "f.weight": torch.nn.Parameter(base)[:, ::2],
        "g.bias": torch.tensor(1.0),
    }
    for safe in (True, False):
        write_adapter(tmp_path / str(safe), tensors, {}, safe_serialization=safe)
        assert content(tmp_path / str(safe))[1] == {k: t.detach().tolist() for k, t in tensors.items()}
    assert (tmp_path / "False" / BIN_NAME).stat().st_size < 6000


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_text("mine")
    (tmp_path / ".veneer").write_text("mine")
    write_adapter(tmp_path, OLD, OLD_CONFIG)
    write_adapter(tmp_path, NEW, NEW_CONFIG)
    assert names(tmp_path) == {"optimizer.pt", ".veneer", CONFIG_NAME, SAFETENSORS_NAME}
    assert content(tmp_path) == (NEW_CONFIG, lists(NEW))


@pytest.mark.parametrize("safe", [True, False])
def test_the_other_format_is_removed(tmp_path: Path, safe: bool) -> None:
    write_adapter(tmp_path, OLD, OLD_CONFIG, safe_serialization=not safe)
    write_adapter(tmp_path, NEW, NEW_CONFIG, safe_serialization=safe)
    assert names(tmp_path) == {CONFIG_NAME, SAFETENSORS_NAME if safe else BIN_NAME}
    assert content(tmp_path) == (NEW_CONFIG, lists(NEW))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "there are no tensors"),
        ({"m.lora_A.weight": torch.empty(0)}, "shard of FSDP or ZeRO"),
        ({"m.lora_B.weight": torch.empty(4, 0)}, "shard of FSDP or ZeRO"),
        ({"m.lora_A.weight": torch.ones(32)}, "shard of FSDP or ZeRO"),
        ({"m.lora_embedding_A": torch.ones(32)}, "shard of FSDP or ZeRO"),
        ({"score.weight": torch.empty(0)}, "shard of FSDP or ZeRO"),
        ({"m.lora_A.weight": torch.empty(2, 2, device="meta")}, "meta device"),
        ({"m.lora_A.weight": torch.ones(2, 2).to_sparse()}, "sparse"),
        ({"m.lora_A.weight": [1.0]}, "a list, not a tensor"),
        ({3: torch.ones(2)}, "non-empty string"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, tensors: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        write_adapter(tmp_path / "adapter", tensors, {})
    assert names(tmp_path) == set()


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    tensors = {f"{i}.lora_A.weight": torch.empty(0) for i in range(5)} | {"x": torch.empty(1, device="meta")}
    with pytest.raises(CheckpointError) as caught:
        write_adapter(tmp_path, tensors, {})
    assert "5 x an empty" in str(caught.value) and "1 x a tensor on the meta device" in str(caught.value)


def test_one_dimensional_tensors_that_are_no_factors(tmp_path: Path) -> None:
    tensors = {
        "m.lora_B.bias": torch.ones(3),
        "m.lora_magnitude_vector": torch.ones(3),
        "n.bias": torch.ones(3),
    }
    write_adapter(tmp_path, tensors, {})
    assert content(tmp_path)[1] == lists(tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_warned_of(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = {"m.lora_A.weight": torch.tensor([[1.0, value]]).to(dtype), "m.lora_B.weight": torch.ones(2, 1)}
    with pytest.warns(VeneerWarning, match=r"1 of 2 tensors to save hold NaN or infinity: m\.lora_A\.weight"):
        write_adapter(tmp_path, tensors, {})
    assert set(open_adapter(tmp_path).shapes) == set(tensors)


def test_large_finite_values_are_no_reason_to_warn(tmp_path: Path) -> None:
    tensors = {
        f"{d}".replace(".", "_"): torch.full((2,), torch.finfo(d).max).to(d)
        for d in (torch.float32, torch.float16)
    }
    tensors |= {"low": torch.full((2,), torch.finfo(torch.float32).min)}
    write_adapter(tmp_path, tensors, {})


@pytest.mark.parametrize("config", [{"a": {1, 2}}, {"a": float("nan")}, {"a": object()}])
def test_a_configuration_that_is_no_json_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        write_adapter(tmp_path / "adapter", OLD, config)
    assert names(tmp_path) == set()


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "adapter").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        write_adapter(tmp_path / "adapter", OLD, {})


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let every file that this process writes end at `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("safe", [True, False])
def test_a_full_disk_changes_nothing(tmp_path: Path, safe: bool) -> None:
    write_adapter(tmp_path / "adapter", OLD, OLD_CONFIG, card="# Card")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    large = {"m.lora_A.weight": torch.ones(100, 100)}
    for place in ("adapter", "new/deep"):
        with small_disk(8192), pytest.raises(CheckpointError, match="nothing has changed"):
            write_adapter(tmp_path / place, large, NEW_CONFIG, card="# New", safe_serialization=safe)
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before
    assert names(tmp_path) == {"adapter"}


def test_no_space_left_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_adapter(tmp_path, OLD, OLD_CONFIG)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"nothing has changed: .*No space left"):
        write_adapter(tmp_path, NEW, NEW_CONFIG)
    assert content(tmp_path) == (OLD_CONFIG, lists(OLD)) and len(names(tmp_path)) == 2


def test_a_failure_after_the_tensors_moved_is_said_and_read_correctly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def only_tensors(source: Path, target: Path) -> None:
        if target.name == CONFIG_NAME:
            raise PermissionError(errno.EPERM, "no")
        replace(source, target)

    write_adapter(tmp_path, OLD, OLD_CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", only_tensors)
        with pytest.raises(CheckpointError, match="not all other files could be moved"):
            write_adapter(tmp_path, NEW, NEW_CONFIG)
    with pytest.warns(VeneerWarning, match=r"cut short.*adapter_config\.json is the one before"):
        assert content(tmp_path) == (NEW_CONFIG, lists(NEW))
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == OLD_CONFIG
    with pytest.raises(CheckpointError, match="there are no tensors"):
        write_adapter(tmp_path, {}, {})
    write_adapter(tmp_path, OLD, NEW_CONFIG)
    assert names(tmp_path) == {CONFIG_NAME, SAFETENSORS_NAME}


def test_what_another_save_left_and_cannot_be_removed_stops_the_next(tmp_path: Path) -> None:
    write_adapter(tmp_path, OLD, OLD_CONFIG)
    left = tmp_path / f".veneer-{'0' * 16}.tmp"
    left.mkdir()  # no save of ours makes one, and none removes it
    with pytest.raises(CheckpointError, match=rf"nothing has changed: .*{left.name}"):
        write_adapter(tmp_path, NEW, NEW_CONFIG)
    left.rmdir()
    assert content(tmp_path) == (OLD_CONFIG, lists(OLD)) and len(names(tmp_path)) == 2


def test_a_card_that_cannot_be_read_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path, OLD, OLD_CONFIG, card="# Ours\n")

    def fails(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "no")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        with pytest.raises(CheckpointError, match="cannot be read, and would be written over"):
            write_adapter(tmp_path, NEW, NEW_CONFIG, card="# Theirs\n")
    assert content(tmp_path) == (OLD_CONFIG, lists(OLD)) and (tmp_path / CARD_NAME).read_text() == "# Ours\n"


def test_a_readme_that_was_edited_keeps_its_body(tmp_path: Path) -> None:
    write_adapter(tmp_path, OLD, {}, card="---\ntags:\n- lora\n---\n\n# Made\n")
    (tmp_path / CARD_NAME).write_bytes(b"---\nlicense: mit\ntags: [mine]\n---\r\n\r\nMy text \xff\r\n")
    write_adapter(tmp_path, OLD, {}, card="---\ntags:\n- lora\n---\n\n# Made\n")
    kept = (tmp_path / CARD_NAME).read_bytes()
    assert (
        b"license: mit" in kept and b"- mine\r\n- lora" in kept and kept.endswith(b"\r\n\r\nMy text \xff\r\n")
    )
    write_adapter(tmp_path, OLD, {})
    assert (tmp_path / CARD_NAME).read_bytes() == kept


def test_a_card_by_itself_keeps_every_byte_of_a_body(tmp_path: Path) -> None:
    card = "---\ntags:\n- lora\n---\n\n# Made\n"
    write_card(tmp_path / "new", card)
    assert (tmp_path / "new" / CARD_NAME).read_text() == card
    (tmp_path / CARD_NAME).write_bytes(b"---\r\nlicense: mit\r\n---\r\n\r\nMy text \xff\r\n")
    write_card(tmp_path, card)
    kept = (tmp_path / CARD_NAME).read_bytes()
    assert kept == b"---\r\nlicense: mit\r\ntags:\r\n- lora\r\n---\r\n\r\nMy text \xff\r\n"
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        write_card(tmp_path / "file", card)


def test_a_card_that_cannot_be_written_leaves_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card(tmp_path, "# Ours\n")
    before = (tmp_path / CARD_NAME).read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(CheckpointError, match=r"could not be written.*full"):
        write_card(tmp_path, "---\ntags:\n- new\n---\n")
    assert (tmp_path / CARD_NAME).read_bytes() == before and names(tmp_path) == {CARD_NAME}


def test_all_files_are_readable_alike(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_adapter(tmp_path, OLD, OLD_CONFIG, card="text")
    finally:
        os.umask(old)
    assert {oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {"0o644"}
