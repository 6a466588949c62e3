"""Combining adapters, defined on the update."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.laws.cases import train
from tests.tolerances import OPS_SPECTRUM, assert_close
from veneer import CombineError, LoraConfig, PeftModel, VeneerWarning, get_peft_model
from veneer.errors import AdapterNameError
from veneer.ops import pruning


class Net(nn.Module):
    """One layer of each geometry, the convolution with and without groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 8)
        self.conv1d = Conv1D(6, 8)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(6, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        """Only the chain of matrices."""
        return self.conv1d(self.linear(self.embed(x)))


PLAIN = ["embed", "linear", "conv1d", "conv"]


def made(dtype: torch.dtype = torch.float32, targets: list[str] | None = None) -> PeftModel:
    def config(r: int, **more: Any) -> LoraConfig:
        return LoraConfig(r=r, lora_alpha=r + 3, target_modules=targets or PLAIN, **more)

    model = get_peft_model(Net().to(dtype), config(4), "a")
    model.add_adapter("b", config(2, use_rslora=True))
    model.add_adapter("c", config(6, rank_pattern={"linear": 2}, alpha_pattern={"linear": 9}))
    for seed, name in enumerate("abc"):
        train(model, name, seed)
    return model


def deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    return {p: m.get_delta_weight(name) for p, m in model.base_model.layers().items() if name in m.r}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "cat"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.5, 2.0], [0.0, 1.0, 0.0]])
def test_sums_are_exact(dtype: torch.dtype, kind: str, weights: list[float]) -> None:
    model = made(dtype)
    report = model.base_model.add_weighted_adapter(["a", "b", "c"], weights, "sum", kind)
    parts = [deltas(model, name) for name in "abc"]
    for path, delta in deltas(model, "sum").items():
        assert delta.dtype == dtype
        assert_close(delta, sum(w * part[path] for w, part in zip(weights, parts, strict=True)))
    assert report.worst == 0.0
    assert report.ranks["linear"] == 8 and report.ranks["conv"] == 12


def test_groups_are_summed_group_by_group() -> None:
    def config(r: int) -> LoraConfig:
        return LoraConfig(r=r, lora_alpha=5, target_modules=["grouped"])

    model = get_peft_model(Net(), config(4), "a")
    model.add_adapter("b", config(2))
    train(model, "a", 0)
    train(model, "b", 1)
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", "cat")
    wanted = 0.5 * deltas(model, "a")["grouped"] - 2.0 * deltas(model, "b")["grouped"]
    assert_close(deltas(model, "sum")["grouped"], wanted)
    with pytest.raises(CombineError, match="groups"):
        model.base_model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "other", "svd")


@pytest.mark.parametrize("rank", [None, 1, 3, 40])
def test_svd_is_the_best_of_its_rank_and_says_the_error(rank: int | None) -> None:
    model = made()
    report = model.base_model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "cut", "svd", svd_rank=rank)
    one, two = deltas(model, "a"), deltas(model, "b")
    for path, delta in deltas(model, "cut").items():
        wanted = one[path] - 0.5 * two[path]
        assert report.ranks[path] == (rank or 4)
        values = torch.linalg.svdvals(wanted.flatten(1).double())
        best = float(values[rank or 4 :].norm() / values.norm())
        assert report.errors[path] == pytest.approx(best, abs=OPS_SPECTRUM.atol)
        assert float((delta - wanted).norm() / wanted.norm()) == pytest.approx(best, abs=OPS_SPECTRUM.atol)


def test_an_adapter_that_some_layers_lack_counts_as_zero_there() -> None:
    model = made()
    model.add_adapter("d", LoraConfig(r=2, lora_alpha=5, target_modules=["linear"]))
    train(model, "d", 7)
    model.base_model.add_weighted_adapter(["a", "d"], [1.0, 1.0], "sum", "cat")
    assert_close(deltas(model, "sum")["conv"], deltas(model, "a")["conv"])
    assert_close(deltas(model, "sum")["linear"], deltas(model, "a")["linear"] + deltas(model, "d")["linear"])


def test_biases_of_b_are_summed_with_their_scaling() -> None:
    def config(r: int) -> LoraConfig:
        return LoraConfig(r=r, lora_alpha=5, target_modules=["linear"], lora_bias=True)

    model = get_peft_model(Net(), config(4), "a")
    model.add_adapter("b", config(2))
    train(model, "a", 0)
    train(model, "b", 1)
    layer = model.base_model.layers()["linear"]
    x = torch.randn(3, 6)
    base = layer.base_layer(x)
    outputs = []
    for name in ("a", "b"):
        model.set_adapter(name)
        outputs.append(layer(x) - base)
    model.base_model.add_weighted_adapter(["a", "b"], [2.0, -1.0], "sum", "cat")
    model.set_adapter("sum")
    assert_close(layer(x) - base, 2 * outputs[0] - outputs[1])


def test_the_set_strength_counts() -> None:
    model = made()
    model.base_model.set_strength("a", 3.0)
    model.base_model.add_weighted_adapter(["a"], [1.0], "twice", "linear")
    assert_close(deltas(model, "twice")["linear"], deltas(model, "a")["linear"])


def test_a_rank_that_cuts_nothing_is_told() -> None:
    model = made()
    with pytest.warns(VeneerWarning, match="'cat' cuts nothing, so svd_rank=3 has no effect"):
        model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "n", "cat", svd_rank=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], [1.0], "n", "cat"), "2 adapters but 1 weights"),
        ((["a", "a"], [1.0, 1.0], "n", "cat"), "named twice"),
        ((["a"], [float("nan")], "n", "cat"), "finite"),
        ((["a"], [1.0], "n", "tie"), "does not exist"),
        ((["a", "b"], [1.0, 1.0], "n", "ties", None, None, True, None, 0.5), "'ties_svd'"),
        ((["a", "c"], [1.0, 1.0], "n", "ties_svd"), "from 0 to 1, got None"),
        ((["a", "c"], [1.0, 1.0], "n", "dare_linear_svd", None, None, True, None, 1.5), "from 0 to 1"),
        ((["a", "c"], [1.0, 1.0], "n", "cat", None, None, True, None, 0.5), "density belongs to"),
        ((["a"], [1.0], "n", "ties", None, None, True, None, 0.5, "loudest"), "majority_sign_method"),
        ((["a"], [1.0], "n", "svd", 0), "svd_rank"),
        ((["a"], [1.0], "n", "svd", True), "svd_rank"),
        (([], [], "n", "cat"), "no adapter"),
        ((["a", "b"], [True, 1.0], "n", "cat"), "finite"),
        ((["a", "b"], [np.bool_(True), 1.0], "n", "cat"), "finite"),
        ((["a", "b"], torch.tensor([True, False]), "n", "cat"), "finite"),
        ((["a", "b"], [torch.ones(1), 1.0], "n", "cat"), "finite"),
        ((["a", "b"], [torch.tensor(float("inf")), 1.0], "n", "cat"), "finite"),
        ((["a", "b"], [np.complex64(1), 1.0], "n", "cat"), "finite"),
        ((["a", "b"], ["1", None], "n", "cat"), "finite"),
        (("a", [1.0, 2.0], "n", "cat"), "1 adapters but 2 weights"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_added(
    arguments: tuple[Any, ...], message: str
) -> None:
    model = made()
    with pytest.raises(CombineError, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["a", "b", "c"]
    assert all("n" not in m.r for m in model.base_model.layers().values())


@pytest.mark.parametrize(
    "weights",
    [
        [torch.tensor(0.5), torch.tensor(-2, requires_grad=False)],
        [torch.tensor(0.5, requires_grad=True), -2],
        [np.float32(0.5), np.int64(-2)],
        np.array([0.5, -2.0]),
        torch.tensor([0.5, -2.0]),
        (0.5, -2.0),
    ],
)
def test_weights_are_numbers_of_any_library(weights: Any) -> None:
    model = made()
    model.base_model.add_weighted_adapter(["a", "b"], weights, "n", "cat")
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "plain", "cat")
    expected = deltas(model, "plain")
    assert all(torch.equal(delta, expected[path]) for path, delta in deltas(model, "n").items())


def test_factors_that_leave_the_range_of_their_type_are_refused() -> None:
    model = get_peft_model(
        Net().half(), LoraConfig(r=2, target_modules=PLAIN), "a", autocast_adapter_dtype=False
    )
    train(model, "a", 0)
    with pytest.raises(CombineError, match=r"linear: the new factors leave the range of torch\.float16"):
        model.base_model.add_weighted_adapter(["a"], [1e9], "huge", "cat")
    assert list(model.peft_config) == ["a"]


def test_one_name_may_stand_alone() -> None:
    model = get_peft_model(Net(), LoraConfig(r=4, lora_alpha=7, target_modules=PLAIN))
    train(model, "default", 0)
    model.base_model.add_weighted_adapter("default", [0.5], "less", "cat")
    model.base_model.add_weighted_adapter("default", 0.5, "again", "cat")
    for path, delta in deltas(model, "default").items():
        assert_close(deltas(model, "less")[path], 0.5 * delta)
        assert torch.equal(deltas(model, "again")[path], deltas(model, "less")[path])
    with pytest.raises(AdapterNameError, match="'nobody'"):
        model.base_model.add_weighted_adapter("nobody", [0.5], "n", "cat")


def test_all_faults_come_at_once() -> None:
    with pytest.raises(CombineError) as caught:
        made().base_model.add_weighted_adapter(["a", "b"], [float("inf")], "n", "dare")
    assert "weights" in str(caught.value) and "dare" in str(caught.value) and "finite" in str(caught.value)


def test_unknown_and_taken_names_are_refused() -> None:
    model = made()
    with pytest.raises(AdapterNameError, match="'x'"):
        model.base_model.add_weighted_adapter(["a", "x"], [1.0, 1.0], "n", "cat")
    with pytest.raises(AdapterNameError, match="already exists"):
        model.base_model.add_weighted_adapter(["a"], [1.0], "b", "cat")


def test_the_result_saves_and_loads(tmp_path: Any) -> None:
    base = Net()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=7, target_modules=PLAIN), "a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=7, target_modules=["linear"]))
    train(model, "a", 0)
    train(model, "b", 1)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum", "cat")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = Net()
    again.load_state_dict(state)
    loaded = PeftModel.from_pretrained(again, tmp_path / "sum", "sum")
    for path, delta in deltas(loaded, "sum").items():
        assert torch.equal(delta, deltas(model, "sum")[path]), path


def test_a_result_with_and_without_biases_saves_and_loads(tmp_path: Any) -> None:
    base = Net()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["linear"], lora_bias=True), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["conv1d", "conv", "grouped"]))
    train(model, "a", 0)
    train(model, "b", 1)
    with torch.no_grad():
        model.base_model.layers()["linear"].factors("a")[2].add_(1.0)
    model.base_model.add_weighted_adapter(["a", "b"], [2.0, 0.5], "sum", "cat")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = Net()
    again.load_state_dict(state)
    loaded = PeftModel.from_pretrained(again, tmp_path / "sum", "sum").base_model.layers()
    assert set(loaded) == {"linear", "conv1d", "conv", "grouped"}
    for path, layer in model.base_model.layers().items():
        for ours, theirs in zip(layer.factors("sum"), loaded[path].factors("sum"), strict=True):
            assert torch.equal(ours, theirs), path
    summed = loaded["linear"].factors("sum")[2]
    original = model.base_model.layers()["linear"]
    assert_close(summed, 2.0 * original.scaling["a"] * original.factors("a")[2])
    assert all(not loaded[path].factors("sum")[2].any() for path in ("conv1d", "conv", "grouped"))


def test_a_bias_and_an_embedding_cannot_be_combined() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["linear"], lora_bias=True), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["embed"]))
    with pytest.raises(CombineError, match="embed: lora_bias has no meaning for an embedding"):
        model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    assert "sum" not in model.peft_config
    assert all("sum" not in layer.held_adapters for layer in model.base_model.layers().values())


class Nested(nn.Module):
    """A layer whose path is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 4)
            self.sub = nn.ModuleDict({"fc": nn.Linear(4, 4)})


def test_a_result_on_a_layer_whose_path_ends_anothers_saves_and_loads(tmp_path: Any) -> None:
    model = get_peft_model(Nested(), LoraConfig(r=2, target_modules="^fc$"), "a")
    train(model, "a", 0)
    model.base_model.add_weighted_adapter(["a"], [0.5], "less", "cat")
    model.save_pretrained(tmp_path, selected_adapters=["less"])
    for reader in (PeftModel, peft.PeftModel):
        loaded = reader.from_pretrained(Nested(), tmp_path / "less", "less")
        held = {p for p, m in loaded.base_model.model.named_modules() if "less" in getattr(m, "r", ())}
        assert held == {"fc"}
        assert_close(loaded.base_model.model.fc.get_delta_weight("less"), deltas(model, "less")["fc"])


@pytest.mark.parametrize("kind", list(pruning.METHODS))
def test_keeping_everything_of_one_adapter_is_that_adapter(kind: str) -> None:
    model = made()
    for form in (kind, f"{kind}_svd"):
        model.base_model.add_weighted_adapter(["a"], [1.0], form, form, density=1.0)
        for path, delta in deltas(model, "a").items():
            assert_close(deltas(model, form)[path], delta, OPS_SPECTRUM)


def test_updates_that_are_trimmed_and_voted_are_those_of_the_dense_ones() -> None:
    model = made()
    weights = [0.5, -2.0]
    report = model.base_model.add_weighted_adapter(
        ["a", "c"], weights, "n", "ties_svd", svd_rank=20, density=0.3
    )
    assert report.worst < 1e-5
    for path, delta in deltas(model, "n").items():
        both = [deltas(model, name)[path] for name in "ac"]
        assert_close(delta, pruning.combine(both, weights, "ties", 0.3), OPS_SPECTRUM)


def test_a_rank_that_is_cut_is_reported() -> None:
    model = made()
    report = model.base_model.add_weighted_adapter(
        ["a", "c"], [1.0, 1.0], "n", "magnitude_prune_svd", svd_rank=1, density=0.5
    )
    assert 0.05 < report.worst < 1
