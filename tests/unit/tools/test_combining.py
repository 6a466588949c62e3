"""Adding up adapters on disk: what a model computes with them, and what cannot be added."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tolerances import BY_DTYPE, OPS_SPECTRUM, assert_close
from tests.unit.integrations.export.adapters import CASES, save
from tests.unit.tools.updates import loaded
from veneer import (
    BaseMismatchError,
    CombineError,
    ConfigError,
    PeftModel,
    VeneerError,
    VeneerWarning,
)
from veneer.arithmetic import COMBINATIONS
from veneer.tools import combine_adapters, compare_adapters
from veneer.tools.requests import METHODS

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of one base, and of one rank, on partly other modules and with other strengths."""
    place = tmp_path_factory.mktemp("pair")
    one = save("linear", place / "one").place
    two = another(save("linear", place / "two", lora_alpha=9, target_modules=["q_proj", "up_proj"]).place)
    return one, two


def another(place: Path) -> Path:
    """With other factors, as two adapters of a case have the same."""
    torch.manual_seed(1)
    tensors = {n: torch.randn_like(t) if ".lora_" in n else t for n, t in load_file(place / TENSORS).items()}
    save_file(tensors, place / TENSORS)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    return place


def in_memory(places: tuple[Path, Path], weights: list[float], kind: str, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(CASES["linear"].build(), places[0], "a", check_base=False)
    model.load_adapter(places[1], "b", check_base=False)
    torch.manual_seed(3)
    model.base_model.add_weighted_adapter(["a", "b"], weights, "sum", kind, **options)
    layers = model.base_model.layers()
    return {
        path: m.get_delta_weight("sum").detach() for path, m in layers.items() if "sum" in m.held_adapters
    }


def test_the_kinds_are_those_of_a_model() -> None:
    assert set(METHODS) == set(COMBINATIONS)


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
@pytest.mark.parametrize("kind", METHODS)
def test_the_update_is_that_of_add_weighted_adapter(
    kind: str, places: tuple[Path, Path], tmp_path: Path
) -> None:
    trims = kind.removesuffix("_svd") not in ("linear", "cat", "svd")
    density = {"density": 0.6} if trims else {}
    rank = 3 if kind.endswith("svd") else None
    weights = [0.5, -1.5]
    wanted = in_memory(places, weights, kind, svd_rank=rank, **density)
    torch.manual_seed(3)
    report = combine_adapters(places, tmp_path / "out", weights, combination_type=kind, rank=rank, **density)
    found = loaded("linear", tmp_path / "out")
    assert found.keys() == wanted.keys() == report.ranks.keys()
    random = kind.startswith("dare")  # which draws in the order of the modules
    for path, delta in wanted.items():
        if not random:
            assert_close(found[path][0], delta, OPS_SPECTRUM)
    assert max(report.ranks.values()) == (3 if rank else 4 if trims else 8)


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
@pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("svd", 3)])
def test_the_reference_library_gets_the_same(
    kind: str, rank: int | None, places: tuple[Path, Path], tmp_path: Path
) -> None:
    combine_adapters(places, tmp_path / "out", [0.5, -1.5], rank=rank)
    torch.manual_seed(0)
    model: Any = peft.PeftModel.from_pretrained(CASES["linear"].build(), str(places[0]), "a")
    model.load_adapter(str(places[1]), "b")
    model.add_weighted_adapter(["a", "b"], [0.5, -1.5], "sum", kind, svd_rank=rank)
    for path, delta in loaded("linear", tmp_path / "out").items():
        layer = model.base_model.model.get_submodule(path)
        if "a" in layer.r and "b" in layer.r:
            assert_close(delta[0], layer.get_delta_weight("sum").detach(), OPS_SPECTRUM)
    again = peft.PeftModel.from_pretrained(CASES["linear"].build(), str(tmp_path / "out"))
    for path, delta in loaded("linear", tmp_path / "out").items():
        layer = again.base_model.model.get_submodule(path)
        assert_close(layer.get_delta_weight("default").detach(), delta[0])


UNSUMMED = (
    "dora",
    "norms",
    "whole",
    "head of",
    "bias of the",
    "every bias",
    "tokens",
    "much at once",
    "alora",
)


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith(UNSUMMED)])
def test_every_kind_of_module_is_added_exactly(case: str, tmp_path: Path) -> None:
    one = save(case, tmp_path / "one").place
    other = shutil.copytree(one, tmp_path / "two")
    report = combine_adapters([one, other], tmp_path / "out", [2.0, -0.5])
    assert report.worst < BY_DTYPE[torch.float32].atol
    before = loaded(case, one)
    for path, delta in loaded(case, tmp_path / "out").items():
        assert_close(delta, 1.5 * before[path], OPS_SPECTRUM)
    half = combine_adapters([one, other], tmp_path / "half", energy=0.999)  # equal updates: no larger rank
    assert all(half.ranks[path] <= rank // 2 for path, rank in report.ranks.items())


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
def test_errors_are_said(places: tuple[Path, Path], tmp_path: Path) -> None:
    report = combine_adapters(places, tmp_path / "cut", [1.0, 0.3], rank=2)
    exact = combine_adapters(places, tmp_path / "all", [1.0, 0.3])
    found = compare_adapters(tmp_path / "all", tmp_path / "cut")
    for path, module in found.modules.items():
        assert (
            module.distance == pytest.approx(report.errors[path], abs=OPS_SPECTRUM.atol)
            and module.distance > 0.05
        )
    assert exact.worst < OPS_SPECTRUM.atol
    pruned = combine_adapters(places, tmp_path / "pruned", combination_type="ties_svd", density=0.5, rank=2)
    assert pruned.worst > 0.05


def test_numbers_that_overflow_are_refused(tmp_path: Path) -> None:
    half = save("linear", tmp_path, torch.float16).place
    with pytest.raises(CombineError, match="leave the range"):
        combine_adapters([half], tmp_path / "out", [1e9])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_types_that_differ_give_the_wider_one(kind: str, tmp_path: Path) -> None:
    one = save("linear", tmp_path / "one", torch.bfloat16).place
    two = Path(shutil.copytree(one, tmp_path / "two"))
    save_file({name: t.double() for name, t in load_file(one / TENSORS).items()}, two / TENSORS)
    density = {"density": 1.0} if kind == "ties_svd" else {}
    combine_adapters([one, two], tmp_path / "out", [0.5, 0.25], combination_type=kind, **density)
    assert {t.dtype for t in load_file(tmp_path / "out" / TENSORS).values()} == {torch.float64}


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
def test_biases_of_b_are_added_too(tmp_path: Path) -> None:
    one = save("lora_bias", tmp_path / "one").place
    combine_adapters([one, shutil.copytree(one, tmp_path / "two")], tmp_path / "out", [2.0, 1.0])
    before, after = load_file(one / TENSORS), load_file(tmp_path / "out" / TENSORS)
    biases = [name for name in before if name.endswith("lora_B.bias")]
    assert biases
    for name in biases:
        assert_close(after[name], 3.0 * 1.5 * before[name])  # alpha / r = 1.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "weights takes a number for each adapter: 2, not 1"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"combination_type": "sum"}, "is one of linear, cat"),
        ({"combination_type": "ties"}, "ties needs density"),
        ({"combination_type": "ties", "density": 0.5, "rank": 3}, "ties_svd"),
        ({"density": 0.5}, "density belongs to"),
        ({"combination_type": "ties", "density": "0.5"}, "a share from 0 to 1, got '0.5'"),
        ({"energy": "0.9"}, "energy must be a share above 0 and up to 1, got '0.9'"),
        ({"majority_sign_method": "loudest", "rank": 0}, "total or frequency.*; rank must be"),
    ],
)
def test_what_makes_no_sense_is_refused(options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        combine_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="no adapter was named"):
        combine_adapters([], tmp_path / "out")
    with pytest.raises(ConfigError, match="a number for each adapter: 1, not 2"):
        combine_adapters(str(tmp_path / "a"), tmp_path / "out", [1.0, 2.0])


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
def test_adapters_that_have_no_sum_are_refused_together(places: tuple[Path, Path], tmp_path: Path) -> None:
    dora = save("much at once", tmp_path / "dora").place
    alora = save("alora", tmp_path / "alora").place
    bias = save("lora_bias", tmp_path / "bias").place
    other = save("gpt2", tmp_path / "gpt2").place
    with pytest.raises(CombineError) as caught:
        combine_adapters([places[0], dora, alora], tmp_path / "out")
    message = str(caught.value)
    assert "of the variant dora" in message and "of the variant alora" in message
    assert "more than updates" in message and "differ in task_type" in message
    with pytest.raises(CombineError, match="lora_bias, which ties cannot combine"):
        combine_adapters([bias], tmp_path / "out", combination_type="ties", density=0.5)
    smaller = save("linear", tmp_path / "smaller", r=2).place
    with pytest.raises(CombineError, match=r"of rank 4 in .*of rank 2 in "):
        combine_adapters([places[0], smaller], tmp_path / "out", combination_type="ties", density=0.5)
    with pytest.raises(CombineError, match="differ in fan_in_fan_out"):
        combine_adapters([places[0], other], tmp_path / "out")
    with pytest.raises(VeneerError, match="the adapter itself"):
        combine_adapters(places, places[1], overwrite=True)
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_bases_are_refused(places: tuple[Path, Path], tmp_path: Path) -> None:
    import tests.unit.integrations.export.adapters as adapters

    real = adapters.CASES["linear"]
    torch.manual_seed(5)

    def different() -> Any:
        model = real.build()
        for parameter in model.parameters():
            parameter.data = parameter.data.neg()
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(adapters.CASES, "linear", adapters.Case(different, real.options, real.targets))
        other = save("linear", tmp_path / "other").place
    with pytest.raises(BaseMismatchError, match="different base models"):
        combine_adapters([places[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_name_of_the_base_is_mentioned(places: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.warns(VeneerWarning) as said:
        combine_adapters(places, tmp_path / "out")
    assert any("name different base models" in str(warning.message) for warning in said)


@pytest.mark.filterwarnings("ignore::veneer.VeneerWarning")
def test_embeddings_that_came_along_have_to_be_the_same(tmp_path: Path) -> None:
    one = save("llama embedding", tmp_path / "one").place
    two = Path(shutil.copytree(one, tmp_path / "two"))
    combine_adapters([one, two], tmp_path / "out")
    tensors = load_file(two / TENSORS)
    name = next(name for name in tensors if name.endswith(".base_layer.weight"))
    assert torch.equal(load_file(tmp_path / "out" / TENSORS)[name], tensors[name])
    save_file({**tensors, name: tensors[name] + 1}, two / TENSORS)
    with pytest.raises(CombineError, match="carries another"):
        combine_adapters([one, two], tmp_path / "again")


def test_the_targets_take_the_modules_of_all_and_no_others(tmp_path: Path) -> None:
    one = save("linear", tmp_path / "one", layers_to_transform=[0]).place
    two = another(save("linear", tmp_path / "two", target_modules=["up_proj"]).place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        combine_adapters([one, two], tmp_path / "out")
    found = loaded("linear", tmp_path / "out")
    assert set(found) == set(loaded("linear", one)) | set(loaded("linear", two))
    kinds = [save("experts", tmp_path / "experts").place] * 1
    combine_adapters(kinds, tmp_path / "experts-again")
    assert loaded("experts", tmp_path / "experts-again").keys() == loaded("experts", kinds[0]).keys()
