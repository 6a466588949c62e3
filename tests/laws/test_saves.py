"""A kill between any two writes of a save, and readers beside writers: the old adapter or the new one."""

from __future__ import annotations

import io
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import nn

from tests.configurations import read_config
from tests.kills import dies_at, ended, forked
from veneer import CheckpointError, LoraConfig, PeftConfig, PeftModel, VeneerWarning, get_peft_model
from veneer.files.header import metadata_and_shapes
from veneer.files.layout import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from veneer.files.read import open_adapter
from veneer.files.write import write_adapter
from veneer.hotswap import hotswap_adapter
from veneer.integrations.export.source import read_source
from veneer.listing import find_adapters
from veneer.lora_file import open_lora
from veneer.training.adapters import describe
from veneer.training.merge_files import base_directory, merge_files
from veneer.training.saved_adapter import read_adapter
from veneer.training.spectra import spectra

#: Every adapter here has the same shapes, so that only its values and its strength tell it from another.
R, WIDTH = 2, 4
NAME = "base_model.model.up.lora_{}.weight"
#: ``lora_alpha`` of an adapter whose ``lora_A`` and ``lora_B`` hold this value everywhere.
OLD, NEW = 1, 3

Seen = tuple[float, float]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.up(x)
        return result


def config(value: int) -> dict[str, Any]:
    return LoraConfig(
        r=R, lora_alpha=8 * value, target_modules=["up"], base_model_name_or_path=str(value)
    ).to_json()


def tensors(value: int) -> dict[str, torch.Tensor]:
    return {
        NAME.format("A"): torch.full((R, WIDTH), float(value)),
        NAME.format("B"): torch.full((WIDTH, R), float(value)),
    }


def save(place: Path, value: int, **options: Any) -> None:
    write_adapter(place, tensors(value), config(value), card=f"# {value}\n", **options)


def save_as_others_do(place: Path, value: int) -> None:
    """What PEFT, and Veneer before, wrote: nothing in the tensors' metadata."""
    place.mkdir(exist_ok=True)
    save_file(tensors(value), place / SAFETENSORS_NAME, metadata={"format": "pt"})
    (place / CONFIG_NAME).write_text(json.dumps(config(value), indent=2) + "\n")


def adapted(value: int = 7) -> PeftModel:
    model = get_peft_model(Base(), LoraConfig(r=R, lora_alpha=8 * value, target_modules=["up"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(float(value))
    return model


def only(held: Iterable[torch.Tensor]) -> float:
    """The one value that all tensors hold everywhere."""
    (value,) = {v for tensor in held for v in tensor.flatten().tolist()}
    return float(value)


def of_model(model: Any, name: str) -> Seen:
    layer = model.base_model.model.up
    return only(getattr(layer, f"lora_{role}")[name].weight for role in "AB"), layer.scaling[name] * R


def by_from_pretrained(place: Path) -> Seen:
    return of_model(PeftModel.from_pretrained(Base(), place), "default")


def by_load_adapter(place: Path) -> Seen:
    model = adapted()
    model.load_adapter(place, "other")
    return of_model(model, "other")


def by_hotswap(place: Path) -> Seen:
    model = adapted()
    hotswap_adapter(model, str(place), "default")
    return of_model(model, "default")


def by_configuration(place: Path) -> Seen:
    # Of the tensors there is nothing in a configuration; they are read beside it.
    found = PeftConfig.from_pretrained(place)
    return only(open_adapter(place).tensors().values()), found.lora_alpha


def by_read_config(place: Path) -> Seen:
    return by_configuration(place)[0], read_config(place)["lora_alpha"]


def by_head(place: Path) -> Seen:
    """What `generate`, `chat`, `eval` and `merge` look at first, with the tensors whose header it reads."""
    values = []

    def read(path: Path) -> Any:
        raw = path.read_bytes()  # a mapped file could be replaced while it is opened
        tensors = torch.load(io.BytesIO(raw), weights_only=True) if path.suffix == ".bin" else load(raw)
        values.append(only(tensors.values()))
        return metadata_and_shapes(path)

    with mock.patch("veneer.training.saved_adapter.metadata_and_shapes", read):
        alpha = read_adapter(place).config.lora_alpha
    return values[-1], alpha


def by_inspect(place: Path) -> Seen:
    lora = open_lora(place)
    (alpha,), (update,) = describe(lora)["alphas"], spectra(lora)
    # ``s·B A`` of two factors that hold v everywhere is s·r·v² everywhere.
    return round((update.norm / (update.scaling * R * WIDTH)) ** 0.5, 4), alpha


def by_export(place: Path) -> Seen:
    update = read_source(place).updates["up"]
    return float(update.a[0, 0]), update.scaling * R


def by_merging_files(place: Path) -> Seen:
    base = place.parent / "base"
    if not base.is_dir():
        base.mkdir()
        save_file({"up.weight": torch.zeros(WIDTH, WIDTH)}, base / "model.safetensors")
        (base / "config.json").write_text("{}")
    merged = place.parent / f"merged{len(list(place.parent.iterdir()))}"
    merge_files(place, base_directory(place, str(base)), merged)
    # s·r·v² = lora_alpha · v², which is 8 v³ where both are of one adapter.
    value = round((only(load_file(merged / "model.safetensors").values()) / 8) ** (1 / 3), 4)
    return value, 8 * value


def by_listing(place: Path) -> Seen:
    for entry in find_adapters(place):
        # It names the tensors by their shapes alone; the base stands for the rest of the configuration.
        return by_read_config(place)[0], 8.0 * int(entry.base or 0)
    raise CheckpointError("there is none")


DOORS: dict[str, Callable[[Path], Seen]] = {
    "PeftModel.from_pretrained": by_from_pretrained,
    "load_adapter": by_load_adapter,
    "hotswap_adapter": by_hotswap,
    "PeftConfig.from_pretrained": by_configuration,
    "read_config": by_read_config,
    "generate, chat, eval, merge": by_head,
    "inspect": by_inspect,
    "ls": by_listing,
    "export": by_export,
    "merge --low-memory": by_merging_files,
}
WHOLE = {(float(value), 8.0 * value): value for value in (OLD, NEW)}


def seen(door: Callable[[Path], Seen], place: Path) -> int | None:
    """OLD or NEW, or None where there is no adapter yet; anything else is a mixture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(cut short|is a pickle|is missing)", VeneerWarning)
        try:
            found = door(place)
        except CheckpointError:
            assert not {SAFETENSORS_NAME, BIN_NAME} & set(os.listdir(place)) if place.is_dir() else True
            return None
    assert found in WHOLE, f"a mixture: {found}"
    return WHOLE[found]


def content(place: Path) -> frozenset[tuple[str, bytes]]:
    """What lies in a directory; files of names that are left to chance by what they hold alone."""
    files = place.iterdir() if place.is_dir() else ()
    return frozenset(("" if p.name.startswith(".") else p.name, p.read_bytes()) for p in files)


BEFORE: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda place: save(place, OLD),
    "bin": lambda place: save(place, OLD, safe_serialization=False),
    "of others": lambda place: save_as_others_do(place, OLD),
    "nothing": lambda place: None,
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("safe", [True, False], ids=["to safetensors", "to bin"])
def test_a_kill_between_any_two_writes_leaves_the_old_adapter_or_the_new_one(
    tmp_path: Path, before: str, safe: bool
) -> None:
    states = []
    found: dict[Any, set[int | None]] = {}
    for step in itertools.count(1):
        place = tmp_path / str(step) / "adapter"
        place.parent.mkdir()
        BEFORE[before](place)
        if not dies_at(step, lambda place=place: save(place, NEW, safe_serialization=safe), place.parent):
            break
        files = content(place)
        if files not in found:  # most steps leave what the one before left
            found[files] = {seen(door, place) for door in DOORS.values()}
            assert len(found[files]) == 1, f"step {step}: {found[files]}"
        states.append(*found[files])
        save(place, NEW, safe_serialization=safe)  # what was left is no obstacle, and goes
        assert {p.name for p in place.iterdir()} == {
            "README.md",
            CONFIG_NAME,
            SAFETENSORS_NAME if safe else BIN_NAME,
        }
    turn = states.index(NEW)
    old = None if before == "nothing" else OLD
    assert turn > 4 and states == [old] * turn + [NEW] * (len(states) - turn)


def test_readers_beside_two_writers_see_one_of_their_adapters(tmp_path: Path) -> None:
    place, end = tmp_path / "adapter", time.monotonic() + 3
    save(place, OLD)

    def write(value: int) -> None:
        while time.monotonic() < end:
            save(place, value)

    writers = [forked(lambda value=value: write(value)) for value in (OLD, NEW)]
    found = []
    while time.monotonic() < end:
        for door in (by_from_pretrained, by_load_adapter, by_hotswap, by_head, by_inspect, by_export):
            found.append(seen(door, place))
    assert [ended(writer) for writer in writers] == [0, 0]  # not one save was refused
    assert set(found) == {OLD, NEW}
    assert sorted(os.listdir(place)) == ["README.md", CONFIG_NAME, SAFETENSORS_NAME]
    assert seen(by_configuration, place) in (OLD, NEW)
