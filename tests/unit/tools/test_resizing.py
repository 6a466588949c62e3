"""Resizing: the best updates of a rank, their error, and everything else as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tolerances import BY_DTYPE, OPS_SPECTRUM, assert_close
from tests.unit.integrations.export.adapters import CASES, Saved, llama, save
from tests.unit.tools.updates import loaded
from veneer import AdapterFileError, ConfigError, PeftModel, VeneerError
from veneer.lora_file import open_lora
from veneer.tools import resize_adapter

TENSORS = "adapter_model.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_the_best_updates_of_the_rank_and_their_error(
    case: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved(case).place
    report = resize_adapter(source, tmp_path / "out", rank=2)
    before, after = loaded(case, source), loaded(case, tmp_path / "out")
    assert before.keys() == after.keys()
    for path, whole in before.items():
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        best = u[..., :2] * s[:, None, :2] @ vh[..., :2, :]
        if path in report.modules:  # a head that shares the update of its embedding has none of its own
            error = float(s[:, 2:].norm() / s.norm())
            assert report.modules[path].after == min(2, report.modules[path].before)
            assert report.modules[path].error == pytest.approx(error, abs=OPS_SPECTRUM.atol)
        assert_close(after[path], best, OPS_SPECTRUM)
    unchanged = load_file(source / TENSORS), load_file(tmp_path / "out" / TENSORS)
    assert unchanged[0].keys() == unchanged[1].keys()
    others = [name for name in unchanged[0] if ".lora_" not in name or "magnitude" in name or "bias" in name]
    assert all(torch.equal(unchanged[0][name], unchanged[1][name]) for name in others)


@pytest.mark.parametrize("case", ["linear", "rslora and patterns", "experts", "subtracted start"])
def test_a_rank_that_nothing_exceeds_changes_nothing(
    case: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved(case).place
    report = resize_adapter(source, tmp_path / "out", rank=99)
    assert report.error == 0.0
    before, after = load_file(source / TENSORS), load_file(tmp_path / "out" / TENSORS)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    source_updates = loaded(case, source)
    for path, update in loaded(case, tmp_path / "out").items():
        assert_close(update, source_updates[path], BY_DTYPE[torch.float32])


@pytest.mark.parametrize("case", ["patterns", "attention", "experts", "conv1d"])
@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_the_smallest_ranks_that_keep_an_energy(
    case: str, energy: float, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    report = resize_adapter(saved(case).place, tmp_path / "out", energy=energy)
    before = loaded(case, saved(case).place)
    for path, module in report.modules.items():
        assert module.error <= (1 - energy) ** 0.5 + OPS_SPECTRUM.atol
        squares = torch.linalg.svdvals(before[path]).square().sum(0)
        kept = float(squares[: module.after - 1].sum() / squares.sum())
        shared = case in ("attention", "experts") and path != "head"  # one rank for several updates
        assert kept < energy + BY_DTYPE[torch.float32].atol or shared
    assert report.error <= (1 - energy) ** 0.5 + OPS_SPECTRUM.atol


def test_a_rank_below_that_of_an_update_is_lossless(tmp_path: Path) -> None:
    """Rank 16 on matrices of 8 rows: half of it is idle."""
    source = save("rank above a side", tmp_path).place
    report = resize_adapter(source, tmp_path / "out", energy=1.0)
    before = loaded("rank above a side", source)
    assert {module.after for module in report.modules.values()} == {8}
    assert report.error < OPS_SPECTRUM.atol
    for path, after in loaded("rank above a side", tmp_path / "out").items():
        assert_close(after, before[path], OPS_SPECTRUM)


def test_errors_count_the_rounding_of_16_bits(tmp_path: Path) -> None:
    source = save("rank above a side", tmp_path, torch.bfloat16).place
    report = resize_adapter(source, tmp_path / "out", rank=8)
    assert load_file(tmp_path / "out" / TENSORS).popitem()[1].dtype == torch.bfloat16
    before, after = (loaded("rank above a side", place) for place in (source, tmp_path / "out"))
    for path, module in report.modules.items():
        error = float((after[path] - before[path]).norm() / before[path].norm())
        assert error > 1e-4
        assert module.error == pytest.approx(error, abs=OPS_SPECTRUM.atol)


def test_files_say_what_they_are(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    source = saved("patterns")
    (source.place / "tokenizer_config.json").write_text("{}")
    resize_adapter(source.place, tmp_path / "out", rank=3)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {2, 3}
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert "r = " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("case", ["patterns", "rslora and patterns", "lora_bias", "experts"])
def test_every_module_keeps_its_strength(case: str, saved: Callable[[str], Saved], tmp_path: Path) -> None:
    """Biases of B and magnitudes, which stay, count with it."""
    source = saved(case).place
    resize_adapter(source, tmp_path / "out", rank=2)
    before, after = (open_lora(place).specs for place in (source, tmp_path / "out"))
    for path, spec in before.items():
        assert after[path].scaling == pytest.approx(spec.scaling)


def test_an_update_of_zero_gets_rank_one(tmp_path: Path) -> None:
    source = save("linear", tmp_path).place
    zero = {name: torch.zeros_like(tensor) for name, tensor in load_file(source / TENSORS).items()}
    save_file(zero, source / TENSORS)
    report = resize_adapter(source, tmp_path / "out", energy=0.9)
    assert {(m.after, m.error) for m in report.modules.values()} == {(1, 0.0)} and report.error == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "rank, or energy"),
        ({"rank": 2, "energy": 0.9}, "not both"),
        ({"rank": 0}, "rank must be a whole number above 0, got 0"),
        ({"rank": True}, "rank must be"),
        ({"energy": 0.0}, "energy must be a share"),
        ({"energy": float("nan")}, "energy must be a share"),
        ({"rank": 2.5, "energy": 2}, "not both; rank must be .*; energy must be"),
    ],
)
def test_what_makes_no_sense_is_refused(options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        resize_adapter(tmp_path / "nowhere", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def _factor(place: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(place / TENSORS)
    name = next(iter(tensors))
    save_file({**tensors, name: change(tensors[name]).contiguous()}, place / TENSORS)


def _config(place: Path, **values: Any) -> None:
    file = place / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not finite": (lambda p: _factor(p, lambda t: t * torch.nan), "NaN or infinity"),
    "integers": (lambda p: _factor(p, lambda t: t.to(torch.int8)), "int8"),
    "empty": (lambda p: _factor(p, lambda t: t[:0]), "have no product"),
    "kernels in B": (
        lambda p: save_file(
            {
                n: t[..., None].repeat(1, 1, 2) if "lora_B" in n else t
                for n, t in load_file(p / TENSORS).items()
            },
            p / TENSORS,
        ),
        "have no product",
    ),
    "an embedding with kernels": (
        lambda p: save_file(
            {
                n.replace("lora_B.weight", "lora_embedding_B").replace(
                    "lora_A.weight", "lora_embedding_A"
                ): t[..., None] if "lora_B" in n else t
                for n, t in load_file(p / TENSORS).items()
            },
            p / TENSORS,
        ),
        "have no product",
    ),
    "another rank": (lambda p: _config(p, r=5), "gives it rank 5"),
    "a changed base": (lambda p: _config(p, init_lora_weights="pissa"), "changed the base"),
    "truncated": (lambda p: os.truncate(p / TENSORS, 900), "truncated"),
    "no configuration": (lambda p: (p / "adapter_config.json").write_text("["), "JSON"),
}


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_adapters_are_one_error_and_nothing_is_written(damage: str, tmp_path: Path) -> None:
    source = save("linear", tmp_path).place
    before = sorted(tmp_path.iterdir())
    DAMAGE[damage][0](source)
    with pytest.raises(AdapterFileError, match=DAMAGE[damage][1]):
        resize_adapter(source, tmp_path / "out", rank=2)
    assert sorted(tmp_path.iterdir()) == before


def test_the_adapter_itself_and_what_is_there_already_are_never_written_over(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved("linear").place
    with pytest.raises(VeneerError, match="contains the adapter itself"):
        resize_adapter(source, source, rank=2, overwrite=True)
    resize_adapter(source, tmp_path, rank=1)
    with pytest.raises(VeneerError, match="not empty"):
        resize_adapter(source, tmp_path, rank=2)
    (tmp_path / "notes.txt").write_text("mine")
    resize_adapter(source, tmp_path, rank=2, overwrite=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_tokenizer_that_lies_elsewhere_is_not_followed(tmp_path: Path) -> None:
    source = save("linear", tmp_path).place
    (tmp_path / "secret").write_text("{}")
    (source / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(VeneerError, match="links are not followed"):
        resize_adapter(source, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_the_base_is_still_recognised(tmp_path: Path) -> None:
    source = save("linear", tmp_path).place
    resize_adapter(source, tmp_path / "out", rank=2)
    PeftModel.from_pretrained(CASES["linear"].build(), tmp_path / "out")
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    with pytest.raises(VeneerError, match="another base model"):
        PeftModel.from_pretrained(other, tmp_path / "out")
