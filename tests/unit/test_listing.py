"""Listing adapters: what is found, what is said of broken ones, and that no tensor is read."""

from __future__ import annotations

import builtins
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from veneer.errors import AdapterFileError
from veneer.listing import find_adapters

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q", "v"], "base_model_name_or_path": "some/base"}


def adapter(place: Path, config: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> Path:
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    shapes = shapes or {"A": (2, 8), "B": (8, 2)}
    tensors = {
        f"base_model.model.l.q.lora_{role}.weight": torch.zeros(shape) for role, shape in shapes.items()
    }
    save_file(tensors, place / "adapter_model.safetensors")
    return place


def test_adapters_are_found_and_described(tmp_path: Path) -> None:
    adapter(tmp_path / "b" / "checkpoint-5")
    (tmp_path / "b" / "checkpoint-5" / "optimizer.pt").write_bytes(b"not read")
    place = adapter(tmp_path / "a", A=(3, 8), B=(8, 3))
    adapter(tmp_path / ".hidden" / "c")
    (tmp_path / "empty").mkdir()
    os.utime(place / "adapter_model.safetensors", (86400, 86400))
    first, second = find_adapters(tmp_path)
    assert first.path == "a" and second.path == "b/checkpoint-5"
    assert (first.base, first.peft_type, first.ranks) == ("some/base", "LORA", (3,))
    assert first.target_modules == ("q", "v") and first.parameters == 48 and not first.problems
    assert first.bytes == (place / "adapter_model.safetensors").stat().st_size
    assert first.modified == "1970-01-02T00:00:00+00:00"
    assert json.loads(json.dumps(first.to_dict()))["path"] == "a"
    assert find_adapters(place)[0].path == "."


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    adapter(tmp_path / "here" / "one")
    adapter(tmp_path / "elsewhere" / "two")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "nowhere").symlink_to(tmp_path / "gone")
    assert [entry.path for entry in find_adapters(tmp_path / "here")] == ["one", "other/two"]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    (adapter(tmp_path / "a-config") / "adapter_config.json").write_text("{")
    (adapter(tmp_path / "b-none") / "adapter_config.json").unlink()
    (adapter(tmp_path / "c-tensors") / "adapter_model.safetensors").unlink()
    file = adapter(tmp_path / "d-cut") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    adapter(tmp_path / "e-half", A=(2, 8))
    adapter(tmp_path / "f-rank", A=(2, 8), B=(8, 3))
    adapter(tmp_path / "g-value", {"r": -1})
    adapter(tmp_path / "h-other", {"peft_type": "IA3"})
    file = adapter(tmp_path / "i-both") / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", 10**9))
    (file.parent / "adapter_config.json").write_text("[]")
    adapter(tmp_path / "j-strange", magnitude=(3,))
    words = {entry.path[0]: " / ".join(entry.problems) for entry in find_adapters(tmp_path)}
    assert "not valid JSON" in words["a"] and "no adapter_config.json" in words["b"]
    assert "neither adapter_model.safetensors" in words["c"] and "truncated" in words["d"]
    assert "only one of the two factors" in words["e"] and "differ in rank" in words["f"]
    assert "-1" in words["g"] and words["h"]
    assert "truncated" in words["i"] and "JSON list" in words["i"] and "no factors" in words["j"]
    assert not any(str(tmp_path) in text for text in words.values())


class Explosive:
    """What may not be unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("it was unpickled",)


def test_a_pickle_is_listed_and_not_opened(tmp_path: Path) -> None:
    place = adapter(tmp_path / "old")
    (place / "adapter_model.safetensors").unlink()
    torch.save({"a": Explosive()}, place / "adapter_model.bin")
    (entry,) = find_adapters(tmp_path)
    assert entry.bytes and entry.parameters is None and not entry.problems
    (place / "adapter_model.bin").write_bytes(b"x" * 10)
    (entry,) = find_adapters(tmp_path)
    assert entry.bytes == 10 and "is truncated, or a pickle" in entry.problems[0]


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="does not exist"):
        find_adapters(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(AdapterFileError, match="is a file"):
        find_adapters(tmp_path / "file")
    assert find_adapters(tmp_path) == []


def test_of_500_adapters_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = adapter(tmp_path / "0", A=(2, 4000), B=(4000, 2))
    tensors = (place / "adapter_model.safetensors").read_bytes()
    config = (place / "adapter_config.json").read_bytes()
    for number in range(1, 500):
        other = tmp_path / str(number)
        other.mkdir()
        (other / "adapter_model.safetensors").write_bytes(tensors)
        (other / "adapter_config.json").write_bytes(config)
        (other / "optimizer.pt").write_bytes(b"")
    (header,) = struct.unpack("<Q", tensors[:8])
    read: dict[str, int] = {}
    usual = io.open

    def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
        file = usual(path, *args, **kwargs)
        name, inner = Path(path).name if isinstance(path, str | os.PathLike) else "", file.read

        def count(size: int = -1) -> Any:
            content = inner(size)
            read[name] = read.get(name, 0) + len(content)
            return content

        file.read = count
        return file

    monkeypatch.setattr(io, "open", counting)
    monkeypatch.setattr(builtins, "open", counting)
    monkeypatch.setattr(torch, "load", None)
    found = find_adapters(tmp_path)
    assert len(found) == 500 and not any(entry.problems for entry in found)
    assert set(read) == {"adapter_model.safetensors", "adapter_config.json"}
    assert read["adapter_model.safetensors"] == 500 * (8 + header) < 500 * len(tensors) / 20
