"""Comparing two adapters: against dense updates, and what is the same is said to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tolerances import ANGLES, BY_DTYPE, OPS_SPECTRUM
from tests.unit.integrations.export.adapters import CASES, save
from tests.unit.tools.updates import loaded
from veneer import AdapterFileError, ConfigError
from veneer.tools import compare_adapters

TENSORS = "adapter_model.safetensors"
CLOSE = BY_DTYPE[torch.float32].atol


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of one base: of ranks 4 and 2, with other strengths."""
    one = save("linear", tmp_path_factory.mktemp("one")).place
    two = save("linear", tmp_path_factory.mktemp("two"), r=2, lora_alpha=9).place
    return one, two


def changed(source: Path, place: Path, *, scale: float = 1.0, **options: Any) -> Path:
    """A copy with every B multiplied, and other options."""
    shutil.copytree(source, place)
    tensors = {n: t * scale if ".lora_B" in n else t for n, t in load_file(place / TENSORS).items()}
    save_file(tensors, place / TENSORS)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, **options}))
    return place


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_at_no_distance_from_itself(case: str, tmp_path: Path) -> None:
    place = save(case, tmp_path).place
    found = compare_adapters(place, place)
    assert found.same_updates and not found.options and not found.shapes and found.only == ((), ())
    assert found.identical == found.tensors[0] == found.tensors[1]
    for module in found.modules.values():
        assert module.distance == 0.0 and module.cosine == pytest.approx(1.0)
        for angles in (module.inputs, module.outputs):
            assert angles is None or (max(angles.degrees) < CLOSE and angles.shared == pytest.approx(1.0))


def test_numbers_are_those_of_the_dense_updates(pair: tuple[Path, Path]) -> None:
    found = compare_adapters(*pair, energy=1.0)
    dense = [loaded("linear", place) for place in pair]
    assert found.modules.keys() == dense[0].keys() and not found.same_updates
    for path, module in found.modules.items():
        one, two = (updates[path][0] for updates in dense)
        norms = float(one.norm()), float(two.norm())
        assert module.ranks == (4, 2)
        assert module.norms == pytest.approx(norms, rel=OPS_SPECTRUM.rtol)
        assert module.distance == pytest.approx(float((one - two).norm()) / max(norms), abs=CLOSE)
        assert module.cosine == pytest.approx(float((one * two).sum()) / norms[0] / norms[1], abs=CLOSE)
        for side, matrices in (("outputs", (one, two)), ("inputs", (one.T, two.T))):
            bases = [torch.linalg.svd(m)[0][:, :r] for m, r in zip(matrices, (4, 2), strict=True)]
            cosines = torch.linalg.svdvals(bases[0].T @ bases[1])
            angles = getattr(module, side)
            assert angles.degrees == pytest.approx(cosines.acos().rad2deg().tolist(), abs=ANGLES.atol)
            assert angles.shared == pytest.approx(float(cosines.square().mean()), abs=CLOSE)
            assert angles.chance == 4 / matrices[0].shape[0]


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
@pytest.mark.parametrize(
    ("scale", "alpha", "distance", "cosine"), [(2.0, 3, 0.0, 1), (1.0, 3, 0.5, 1), (-1.0, 6, 2.0, -1)]
)
def test_the_strength_counts(
    scale: float, alpha: int, distance: float, cosine: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Half of alpha and twice of B are the same update; its opposite is at distance 2."""
    found = compare_adapters(pair[0], changed(pair[0], tmp_path / "b", scale=scale, lora_alpha=alpha))
    for module in found.modules.values():
        assert module.distance == pytest.approx(distance, abs=CLOSE)
        assert module.cosine == pytest.approx(cosine, abs=CLOSE)
        assert module.inputs is not None and module.inputs.shared == pytest.approx(1.0, abs=CLOSE)
    assert found.options == ({} if alpha == 6 else {"lora_alpha": (6, 3)})


def test_directions_of_little_energy_are_left_out(pair: tuple[Path, Path]) -> None:
    few = compare_adapters(*pair, energy=0.3)
    assert all(len(module.inputs.degrees) == 1 for module in few.modules.values() if module.inputs)


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
def test_an_update_of_zero_has_no_directions(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare_adapters(pair[0], changed(pair[0], tmp_path / "b", scale=0.0))
    for module in found.modules.values():
        assert module.distance == pytest.approx(1.0)
        assert (module.cosine, module.inputs, module.outputs) == (None, None, None)
    both = compare_adapters(tmp_path / "b", tmp_path / "b")
    assert all(module.distance == 0.0 for module in both.modules.values())


def test_other_modules_shapes_and_tensors_are_listed(tmp_path: Path) -> None:
    one = save("norms", tmp_path / "one").place
    two = save("linear", tmp_path / "two", target_modules=["q_proj", "up_proj"]).place
    found = compare_adapters(one, two)
    assert all("down_proj" in path for path in found.only[0]) and len(found.only[0]) == 2
    assert all("up_proj" in path for path in found.only[1]) and len(found.only[1]) == 2
    assert all("q_proj" in path for path in found.modules) and len(found.modules) == 2
    assert any("norm" in name for name in found.others) and not found.same_updates
    other = compare_adapters(save("gpt2", tmp_path / "three").place, one)
    assert not other.modules and not other.same_updates
    experts = save("experts", tmp_path / "four").place
    config = json.loads((experts / "adapter_config.json").read_text())
    single = tmp_path / "single"
    shutil.copytree(experts, single)
    tensors = {n: t[:4] if "lora_A" in n else t[:, :4] for n, t in load_file(single / TENSORS).items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, single / TENSORS)
    assert config["target_parameters"]
    shapes = compare_adapters(experts, single).shapes
    assert "experts" in shapes


def test_what_makes_it_no_plain_comparison_is_noted(tmp_path: Path) -> None:
    dora = save("dora", tmp_path).place
    assert "before their magnitudes" in compare_adapters(dora, dora).notes[0]
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.warns(UserWarning, match="edited"):
        assert "changed the base" in compare_adapters(dora, dora).notes[0]


def test_refusals(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="energy must be a share"):
        compare_adapters(*pair, energy=0)
    with pytest.raises(AdapterFileError, match="there is no directory"):
        compare_adapters(pair[0], tmp_path / "nowhere")
    broken = changed(pair[0], tmp_path / "b", scale=float("inf"))
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        compare_adapters(pair[0], broken)
