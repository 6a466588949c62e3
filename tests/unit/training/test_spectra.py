"""Spectra of updates from files: against the dense product, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tolerances import OPS_SPECTRUM, assert_close
from veneer import AdapterFileError, LoraConfig, get_peft_model
from veneer.training.adapters import describe
from veneer.training.heat_map import heat_map
from veneer.training.spectra import UpdateSpectrum, as_json, grid, spectra


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 10)}) for _ in range(2)])
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(3, 5, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["up"](x)[..., :6]
        return x


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A model with random, trained-looking factors, and where they are saved. lora_alpha ≠ r, two ranks."""
    config = LoraConfig(
        r=3, lora_alpha=12, target_modules=["up", "embed", "conv"], rank_pattern={"layers.1.up": 2}
    )
    model: Any = get_peft_model(Mixed(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_the_values_are_those_of_the_dense_update(saved: tuple[Any, Path]) -> None:
    model, place = saved
    updates = {update.path: update for update in spectra(place)}
    assert set(updates) == {"layers.0.up", "layers.1.up", "embed", "conv"}
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")
    }
    for path, update in updates.items():
        dense = layers[path].get_delta_weight("default").detach().flatten(1)
        values = torch.linalg.svdvals(dense.double())
        assert_close(torch.tensor(update.values, dtype=torch.float64), values[: update.r], OPS_SPECTRUM)
        assert update.norm == pytest.approx(float(dense.norm()), rel=OPS_SPECTRUM.rtol)
        assert update.largest == pytest.approx(float(values[0]), rel=OPS_SPECTRUM.rtol)
    assert updates["layers.1.up"].r == 2 and updates["layers.1.up"].scaling == 6.0
    assert updates["conv"].shape == (5, 12)


def spectrum(*values: float, path: str = "a") -> UpdateSpectrum:
    return UpdateSpectrum(path, len(values), 1.0, (8, 8), values)


@pytest.mark.parametrize(
    ("values", "stable", "effective", "first", "needed"),
    [
        ((2.0, 2.0, 2.0, 2.0), 4.0, 4.0, 0.25, 4),
        ((3.0, 0.0, 0.0, 0.0), 1.0, 1.0, 1.0, 1),
        ((0.0, 0.0), 0.0, 0.0, 1.0, 0),
        ((4.0, 3.0), 25 / 16, math.exp(-(4 / 7) * math.log(4 / 7) - (3 / 7) * math.log(3 / 7)), 0.64, 2),
    ],
)
def test_ranks_and_energy(
    values: tuple[float, ...], stable: float, effective: float, first: float, needed: int
) -> None:
    found = spectrum(*values)
    assert found.stable_rank == pytest.approx(stable)
    assert found.effective_rank == pytest.approx(effective)
    assert found.energy(1) == pytest.approx(first)
    assert found.needed() == needed
    assert found.energy(99) == pytest.approx(1.0)
    assert (
        json.loads(json.dumps(list(as_json([found], 1)), allow_nan=False))[0]["rank_for_99_percent"] == needed
    )


def test_several_experts_in_one_pair_of_factors(saved: tuple[Any, Path]) -> None:
    """Parameters of shape (experts, in, out): factors of one expert after the other."""
    _, place = saved
    experts, r, inside, out = 4, 3, 6, 5
    a, b = torch.randn(experts * r, inside), torch.randn(out, r * experts)
    key = "base_model.model.layers.0.experts.lora_{}.weight"
    save_file({key.format("A"): a, key.format("B"): b}, place / "adapter_model.safetensors")
    config = json.loads((place / "adapter_config.json").read_text())
    config["target_parameters"] = ["experts.up"]
    (place / "adapter_config.json").write_text(json.dumps(config))
    (update,) = spectra(place)
    delta = torch.einsum("ore,eri->eoi", b.reshape(out, r, experts), a.reshape(experts, r, inside))
    assert len(update.values) == experts * r
    assert update.norm == pytest.approx(4.0 * float(delta.norm()), rel=OPS_SPECTRUM.rtol)


@pytest.mark.parametrize("damage", ["nan", "rank", "shapes", "none"])
def test_broken_adapters_are_one_error(damage: str, saved: tuple[Any, Path]) -> None:
    _, place = saved
    tensors = load_file(place / "adapter_model.safetensors")
    name = "base_model.model.layers.0.up.lora_A.weight"
    if damage == "nan":
        tensors[name][0, 0] = torch.nan
    elif damage == "rank":
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    elif damage == "shapes":
        tensors[name] = torch.zeros(2, 6)
    else:
        tensors = {"base_model.model.head.weight": torch.zeros(2, 2)}
    save_file(tensors, place / "adapter_model.safetensors")
    said = {
        "nan": "1 of 4 updates .*\n.*layers.0.up: .*NaN",
        "rank": "layers.0.up: the configuration gives it rank 5, its factors have rank 3",
        "shapes": "have no product",
        "none": "holds no factors of a LoRA, only: base_model.model.head.weight",
    }
    with pytest.raises(AdapterFileError, match=said[damage]):
        spectra(place)
    if damage != "nan":
        with pytest.raises(AdapterFileError):
            describe(place)


def test_a_grid_of_layers_and_kinds() -> None:
    paths = ["model.layers.0.q", "model.layers.10.q", "model.layers.2.q", "model.layers.2.moe.0.w", "head"]
    paths.append("model.layers.2.moe.1.w")
    found = grid([spectrum(float(i + 1), path=p) for i, p in enumerate(paths)], lambda u: u.norm)
    assert (found.layers, found.before) == (["0", "2", "10", "–"], "model.layers")
    assert found.kinds == ["q", "moe.*.w", "head"]
    assert found.values == [[1.0, 3.0, 2.0, None], [None, 5.0, None, None], [None, None, None, 5.0]]
    two = grid(
        [spectrum(1.0, path="encoder.block.0.q"), spectrum(2.0, path="decoder.block.0.q")], lambda u: u.norm
    )
    assert two.layers == ["encoder.block.0", "decoder.block.0"] and two.before == ""


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture(suffix: str, saved: tuple[Any, Path], tmp_path: Path) -> None:
    place = tmp_path / f"map{suffix}"
    heat_map(place, spectra(saved[1]), "Updates")
    start = place.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") or b"<svg" in place.read_bytes()[:2000]
