from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.configurations import read_config
from veneer import LoraConfig
from veneer.errors import AdapterFileError, VeneerWarning
from veneer.files import read
from veneer.files.digest import DATA_DIGEST
from veneer.files.header import read_header
from veneer.files.layout import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME, SAVED_CONFIG
from veneer.files.read import open_adapter
from veneer.files.write import write_adapter

TENSORS = {
    "m.lora_A.weight": torch.arange(8.0).reshape(2, 4),
    "m.lora_B.weight": torch.ones(3, 2, dtype=torch.bfloat16),
}
CONFIG = {"peft_type": "LORA", "r": 2}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", TENSORS, CONFIG, metadata={"veneer": "{}"})
    return tmp_path / "adapter"


def test_shapes_dtypes_and_metadata_without_reading_tensors(adapter: Path) -> None:
    file = open_adapter(adapter)
    assert file.path == adapter / SAFETENSORS_NAME
    assert file.shapes == {k: tuple(t.shape) for k, t in TENSORS.items()}
    assert file.dtypes == {k: t.dtype for k, t in TENSORS.items()}
    assert file.metadata.keys() == {"format", "veneer", SAVED_CONFIG, DATA_DIGEST}
    assert file.metadata[SAVED_CONFIG] == (adapter / CONFIG_NAME).read_text()


def test_tensors_all_some_none(adapter: Path) -> None:
    file = open_adapter(str(adapter))
    assert {k: t.tolist() for k, t in file.tensors().items()} == {k: t.tolist() for k, t in TENSORS.items()}
    assert list(file.tensors(["m.lora_B.weight"])) == ["m.lora_B.weight"]
    assert file.tensors([]) == {}
    assert file.tensors(device=torch.device("meta"))["m.lora_A.weight"].is_meta
    with pytest.raises(AdapterFileError, match=r"holds no tensor 'm.lora_C.weight'"):
        file.tensors(["m.lora_A.weight", "m.lora_C.weight"])


def test_one_bit_of_the_data_flipped(adapter: Path) -> None:
    path = adapter / SAFETENSORS_NAME
    whole, first = path.read_bytes(), open_adapter(adapter)._content.header.first  # type: ignore[union-attr]
    for bit in range(8 * first, 8 * len(whole), 37):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(AdapterFileError, match="not those that were saved"):
            open_adapter(adapter).tensors(["m.lora_B.weight"])
    save_file(load_file(path), path)  # the way out that the message names
    assert open_adapter(adapter).tensors().keys() == TENSORS.keys()


def test_tensors_are_those_of_the_file_that_was_opened(adapter: Path) -> None:
    file, other = open_adapter(adapter), {k: t * 0 for k, t in TENSORS.items()}
    write_adapter(adapter, other, {**CONFIG, "lora_alpha": 5})
    assert {k: t.tolist() for k, t in file.tensors().items()} == {k: t.tolist() for k, t in TENSORS.items()}
    assert LoraConfig.from_belonging(file.belonging_config()).lora_alpha == 8
    file.path.unlink()
    assert file.tensors().keys() == TENSORS.keys()


def test_a_file_that_changes_between_opening_and_reading(adapter: Path, tmp_path: Path) -> None:
    file = open_adapter(adapter)
    write_adapter(tmp_path / "other", {"m.lora_A.weight": torch.ones(2, 4)}, CONFIG)
    file.path.write_bytes((tmp_path / "other" / SAFETENSORS_NAME).read_bytes())
    with pytest.raises(AdapterFileError, match="changed since it was opened"):
        file.tensors()


def test_a_file_that_changes_while_it_is_opened(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "other", {"m.lora_A.weight": torch.ones(200, 4)}, CONFIG)

    def read_and_exchange(path: Path) -> Any:
        header = read_header(path)
        path.write_bytes((tmp_path / "other" / SAFETENSORS_NAME).read_bytes())
        return header

    monkeypatch.setattr(read, "read_header", read_and_exchange)
    with pytest.raises(AdapterFileError, match="it was changed while it was opened"):
        read.open_tensors(adapter / SAFETENSORS_NAME)
    with pytest.raises(AdapterFileError, match="its tensors are replaced again and again"):
        open_adapter(adapter)


def test_a_file_that_cannot_be_mapped(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("unable to mmap 100000000000 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", fails)
    with pytest.raises(AdapterFileError, match="cannot be mapped into memory: unable to mmap"):
        open_adapter(adapter)


def test_an_archive_of_several_disks(tmp_path: Path) -> None:
    locator = b"PK\6\7" + struct.pack("<LQL", 0, 0, 2)
    (tmp_path / BIN_NAME).write_bytes(bytes(64) + locator + b"PK\5\6" + bytes(18))
    with pytest.raises(AdapterFileError, match="multiple disks"):
        open_adapter(tmp_path)


def test_tensors_stay_what_they_were_when_the_adapter_is_saved_again(adapter: Path) -> None:
    before = open_adapter(adapter).tensors()
    write_adapter(adapter, {k: t * 0 for k, t in TENSORS.items()}, CONFIG)
    assert before["m.lora_A.weight"].tolist() == TENSORS["m.lora_A.weight"].tolist()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_dtypes_that_adapters_may_hold(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.tensor([[0.0, 1.0]]).to(dtype)
    write_adapter(tmp_path, {"m.lora_A.weight": value}, CONFIG)
    file = open_adapter(tmp_path)
    assert file.dtypes["m.lora_A.weight"] is dtype
    assert torch.equal(file.tensors()["m.lora_A.weight"].view(torch.uint8), value.view(torch.uint8))


def test_bin_is_read_as_tensors_with_one_notice(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / BIN_NAME)
    with pytest.warns(VeneerWarning, match="is a pickle") as said:
        file = open_adapter(tmp_path)
    assert len(said) == 1 and said[0].filename == __file__
    assert file.shapes == {k: tuple(t.shape) for k, t in TENSORS.items()}
    assert file.metadata == {}
    assert all(torch.equal(t, TENSORS[k]) for k, t in file.tensors().items())


def test_safetensors_wins_over_bin(adapter: Path) -> None:
    torch.save({"other": torch.zeros(1)}, adapter / BIN_NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(open_adapter(adapter).shapes) == set(TENSORS)


def test_config_as_it_is(adapter: Path) -> None:
    assert read_config(adapter) == CONFIG


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b'{"lora_alpha": 3, "lora_alpha": 300}', "the key 'lora_alpha' occurs twice"),
        (b'{"r": 8', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[1]", "holds a JSON list"),
        (b" " * (2**25), "is larger than"),
    ],
    ids=["empty", "twice", "truncated", "binary", "nested", "list", "huge"],
)
def test_config_that_is_none(adapter: Path, content: bytes, says: str) -> None:
    (adapter / CONFIG_NAME).write_bytes(content)
    with pytest.raises(AdapterFileError, match=says):
        read_config(adapter)


def test_missing_files_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="The directory is empty"):
        open_adapter(tmp_path)
    (tmp_path / "optimizer.pt").touch()
    (tmp_path / "logs").mkdir()
    with pytest.raises(AdapterFileError, match=r"holds logs/, optimizer\.pt\."):
        open_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match=rf"no {CONFIG_NAME} in .*optimizer\.pt"):
        read_config(tmp_path)
    write_adapter(tmp_path / "helper", TENSORS, CONFIG)
    with pytest.raises(AdapterFileError) as caught:
        open_adapter(tmp_path)
    assert f"Sub-directories hold one: {str(tmp_path / 'helper')!r}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"]
)
def test_a_whole_model_is_named_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(AdapterFileError, match="whole model, not an adapter"):
        read_config(tmp_path)


def test_a_path_that_is_no_directory(adapter: Path) -> None:
    with pytest.raises(AdapterFileError) as caught:
        open_adapter(adapter / SAFETENSORS_NAME)
    assert f"is a file; pass the directory that holds it: {str(adapter)!r}" in str(caught.value)
    with pytest.raises(AdapterFileError, match="there is no directory"):
        read_config(adapter / "nowhere")


def test_names_of_tensors_are_checked(tmp_path: Path) -> None:
    save_file({"a\nb": torch.ones(1)}, tmp_path / SAFETENSORS_NAME)
    with pytest.raises(AdapterFileError, match="control character"):
        open_adapter(tmp_path)
    save_file({"a" * 2000: torch.ones(1)}, tmp_path / SAFETENSORS_NAME)
    with pytest.raises(AdapterFileError, match="2000 characters"):
        open_adapter(tmp_path)
