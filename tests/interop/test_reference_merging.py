"""Merging, several adapters, strengths and combining, beside the reference.

Where the reference is wrong (`BROKEN`), the test shows that it is, and ours is compared with the sum of the
updates.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import veneer
from tests.interop.reference import (
    both,
    expect_same_model,
    expect_same_tensors,
    output,
    peft,
    quiet,
    randomise,
)
from tests.interop.reference_models import llama_config, one_text
from tests.interop.test_reference_files import KINDS, OPTIONS, config
from tests.tolerances import OPS_SPECTRUM, assert_close
from veneer import PeftModel
from veneer.errors import MergeError, VeneerWarning
from veneer.layers import LoraLayer

#: What the reference (0.21.2) does otherwise, and how that shows. Each is shown by a test of that name.
BROKEN = {
    "merging_one_of_two": "a layer with anything merged skips every branch, merged or not",
    "disabling_while_merged": "the forward under disable_adapter() unmerges, so it writes weights",
    "merging_a_tied_head": "the update also reaches the input embedding: logits are far off",
    "unmerging_in_bf16": "the update is subtracted again, rounding twice: the base has drifted",
    "unmerging_after_training": "what is subtracted are the present factors, not those that were merged",
    "linear_of_two": "factors are summed one by one: cross terms B1·A2 appear",
    "weighted_rslora": "the result inherits use_rslora and is scaled by r/√r once more",
    "svd_rank_above_the_layer": "there are fewer singular values than the rank: shapes differ, an error",
    "unload_after_training_a_head": "the trained copy stays in the model: it is not the base again",
    "deleting_the_active": "another adapter becomes active by itself",
}


def filled(kind: str, **options: Any) -> tuple[PeftModel, Any, Tensor, nn.Module]:
    """Both libraries with the same random adapter: ours, theirs, an input, the base."""
    case = KINDS[kind]
    base, inputs = case.build().eval(), case.inputs()
    ours, theirs = both(lambda: base, config(kind, "plain") | options)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, inputs, base


def second(ours: PeftModel, theirs: Any, kind: str, **options: Any) -> None:
    """Another random adapter beside the first."""
    given = config(kind, "plain") | {"r": 2, "lora_alpha": 5} | options
    ours.add_adapter("second", veneer.LoraConfig(**given))
    with quiet():
        theirs.add_adapter("second", peft.LoraConfig(**given))
    theirs.base_model.set_adapter("second")
    randomise(theirs, seed=5)
    theirs.base_model.set_adapter("default")
    ours.load_state_dict(theirs.state_dict())


def close(ours: nn.Module, theirs: nn.Module) -> None:
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys()
    for name, tensor in its.items():
        assert_close(mine[name], tensor)


def layers(model: Any, kind: Any = LoraLayer) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, kind)}


# -- merging -----------------------------------------------------------------------------------------------

MERGED = {
    name: OPTIONS[name]
    for name in (
        "plain",
        "rslora",
        "both_patterns_rslora",
        "modules_to_save",
        "bias_all",
        "layers_to_transform",
    )
}
MERGED["dropout"] = {"lora_dropout": 0.5}
MERGED["lora_bias"] = {"lora_bias": True, "target_modules": ["first"]}


@pytest.mark.parametrize("option", MERGED)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload(kind: str, option: str) -> None:
    if (kind, option) == ("embedding", "lora_bias"):
        option = "plain"  # a table has no bias
    ours, theirs, inputs, base = filled(kind, **MERGED[option])
    expected = output(theirs, inputs)
    mine, its = ours.merge_and_unload(), theirs.merge_and_unload(safe_merge=True)
    assert type(mine) is type(its) is type(base)
    close(mine, its)
    assert mine.state_dict().keys() == base.state_dict().keys()
    assert_close(output(mine, inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unload_gives_the_base_back(kind: str) -> None:
    ours, theirs, _, base = filled(kind)
    for model in (ours, theirs):
        expect_same_tensors(model.unload().state_dict(), base.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_unload_after_training_a_head(kind: str) -> None:
    ours, theirs, _, base = filled(kind, modules_to_save=["head"])
    expect_same_tensors(ours.unload().state_dict(), base.state_dict())
    assert not torch.equal(theirs.unload().head.weight, base.head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_weights(kind: str) -> None:
    ours, theirs, _, _ = filled(kind, use_rslora=True)
    its = layers(theirs, peft.tuners.lora.LoraLayer)
    mine = layers(ours)
    assert mine.keys() == its.keys()
    for name, layer in mine.items():
        assert_close(layer.get_delta_weight("default"), its[name].get_delta_weight("default").detach())
        assert layer.scaling == its[name].scaling and layer.r == its[name].r
        assert layer.lora_alpha == its[name].lora_alpha
        assert layer.use_rslora == its[name].use_rslora


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind: str) -> None:
    ours, theirs, inputs, _ = filled(kind)
    expected, before = output(theirs, inputs), copy.deepcopy(ours.state_dict())
    ours.merge_adapter()
    theirs.merge_adapter()
    close(ours, theirs)
    assert_close(output(ours, inputs), expected)
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    expect_same_tensors(ours.state_dict(), before)
    close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_several_active_adapters(kind: str) -> None:
    ours, theirs, inputs, _ = filled(kind)
    second(ours, theirs, kind)
    for names in (["default", "second"], ["second"], "default", ["second", "default"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        assert ours.active_adapters == theirs.active_adapters
        assert_close(output(ours, inputs), output(theirs, inputs))
        trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
        assert trainable[0] == trainable[1]
    expected = output(theirs, inputs)
    mine, its = ours.merge_and_unload(), theirs.merge_and_unload()
    close(mine, its)
    assert_close(output(mine, inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_of_named_adapters(kind: str) -> None:
    ours, theirs, _, _ = filled(kind)
    second(ours, theirs, kind)
    close(ours.merge_and_unload(adapter_names=["second"]), theirs.merge_and_unload(adapter_names=["second"]))


def test_merging_one_of_two() -> None:
    ours, theirs, inputs, _ = filled("linear")
    second(ours, theirs, "linear")
    ours.set_adapter(["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    expected = output(theirs, inputs)
    ours.merge_adapter(["second"])
    theirs.merge_adapter(["second"])
    assert_close(output(ours, inputs), expected)
    assert (output(theirs, inputs) - expected).abs().max() > 0.1


def test_disabling_while_merged() -> None:
    ours, theirs, inputs, base = filled("linear")
    expected = output(base, inputs)
    for model in (ours, theirs):
        model.merge_adapter()
        merged = copy.deepcopy(model.state_dict())
        with model.disable_adapter():
            assert_close(output(model, inputs), expected)
        written = any(not torch.equal(t, merged[n]) for n, t in model.state_dict().items())
        assert written is (model is theirs)


def test_merging_a_tied_head() -> None:
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=True)).eval()
    inputs = one_text()
    ours, theirs = both(lambda: base, {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"})
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    expected = output(theirs, inputs)
    assert_close(output(ours, inputs), expected)
    with pytest.raises(MergeError, match="untie=True"):
        ours.merge_and_unload()
    assert_close(output(ours.merge_and_unload(untie=True), inputs), expected)
    with quiet():
        merged = theirs.merge_and_unload()
    assert (output(merged, inputs) - expected).abs().max() > 0.1


def test_unmerging_in_bf16() -> None:
    case = KINDS["linear"]
    base = case.build().to(torch.bfloat16).eval()
    ours, theirs = both(lambda: base, config("linear", "plain"))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    inputs = case.inputs().to(torch.bfloat16)
    assert_close(output(ours, inputs), output(theirs, inputs))
    before = copy.deepcopy(ours.state_dict())
    for model in (ours, theirs):
        model.merge_adapter()
    close(ours, theirs)
    for model in (ours, theirs):
        model.unmerge_adapter()
    expect_same_tensors(ours.state_dict(), before)
    assert any(not torch.equal(t, before[n]) for n, t in theirs.state_dict().items())


def test_unmerging_after_training() -> None:
    ours, theirs, _, _ = filled("linear")
    base = {n: t.clone() for n, t in ours.state_dict().items() if "lora_" not in n}
    for model in (ours, theirs):
        model.merge_adapter()
        randomise(model, seed=9)
        model.unmerge_adapter()
    expect_same_tensors({n: t for n, t in ours.state_dict().items() if "lora_" not in n}, base)
    assert any((theirs.state_dict()[n] - t).abs().max() > 0.1 for n, t in base.items())


# -- strengths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"first": 3}}], ids=str)
def test_strengths(options: dict[str, Any]) -> None:
    ours, theirs, inputs, _ = filled("linear", **options)
    its = layers(theirs, peft.tuners.lora.LoraLayer)
    changes = [
        lambda layer: layer.set_scale("default", 0.3),
        lambda layer: layer.scale_layer(2.5),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(0.25),
        lambda layer: layer.set_scale("not there", 7.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scale_layer(0.0),
        lambda layer: layer.unscale_layer(None),
    ]
    for change in changes:
        for name, layer in layers(ours).items():
            change(layer)
            change(its[name])
            assert layer.scaling == pytest.approx(its[name].scaling)
        assert_close(output(ours, inputs), output(theirs, inputs))


def test_strengths_of_tables_are_scaled_here_and_forgotten_there() -> None:
    ours, theirs, _, _ = filled("embedding", target_modules=["first"])
    for layer in layers(ours).values():
        layer.scale_layer(2.0)
        assert layer.scaling == {"default": 3.0}
    for layer in layers(theirs, peft.tuners.lora.LoraLayer).values():
        layer.scale_layer(2.0)
        assert layer.scaling == {"default": 1.5}


# -- life cycle --------------------------------------------------------------------------------------------


def test_disable_adapter() -> None:
    ours, theirs, inputs, base = filled("linear", modules_to_save=["head"])
    expected = output(base, inputs)
    for model in (ours, theirs):
        active = output(model, inputs)
        with model.disable_adapter():
            assert torch.equal(output(model, inputs), expected)
        assert torch.equal(output(model, inputs), active)
        model.base_model.disable_adapter_layers()
        assert torch.equal(output(model, inputs), expected)
        model.base_model.enable_adapter_layers()
        assert torch.equal(output(model, inputs), active)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_disabling_keeps_trained_biases_and_both_say_so(bias: str) -> None:
    ours, theirs, inputs, _ = filled("linear", bias=bias)
    outputs = []
    for model in (ours, theirs):
        with pytest.warns(UserWarning, match="bias"), model.disable_adapter():
            outputs.append(output(model, inputs))
    assert_close(*outputs)


def test_deleting_an_idle_adapter() -> None:
    ours, theirs, inputs, _ = filled("linear")
    second(ours, theirs, "linear")
    for model in (ours, theirs):
        model.delete_adapter("second")
    expect_same_model(ours, theirs)
    assert list(ours.peft_config) == list(theirs.peft_config) == ["default"]
    assert_close(output(ours, inputs), output(theirs, inputs))


def test_deleting_the_active() -> None:
    ours, theirs, _, _ = filled("linear")
    second(ours, theirs, "linear")
    with pytest.warns(VeneerWarning, match="no adapter is active now"):
        ours.delete_adapter("default")
    with quiet():
        theirs.delete_adapter("default")
    assert ours.active_adapters == []
    assert theirs.active_adapters == ["second"]
    expect_same_model(ours, theirs)


def test_unknown_names_raise_the_same_kind_of_error() -> None:
    ours, theirs, _, _ = filled("linear")
    for model in (ours, theirs):
        with pytest.raises(ValueError):
            model.set_adapter("nobody")
        with pytest.raises(ValueError):
            model.delete_adapter("nobody")


# -- combining ---------------------------------------------------------------------------------------------


def delta(model: PeftModel, weights: dict[str, float]) -> dict[str, Tensor]:
    """The sum of the updates that is asked for, dense."""
    return {
        path: sum(w * layer.get_delta_weight(n) for n, w in weights.items())  # type: ignore[misc]
        for path, layer in layers(model).items()
    }


def deltas(model: Any, adapter: str, kind: Any = LoraLayer) -> dict[str, Tensor]:
    return {path: layer.get_delta_weight(adapter).detach() for path, layer in layers(model, kind).items()}


def expect_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        assert_close(found[path], tensor)


@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.0, -1.0), (2.0, 0.0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cat(kind: str, weights: tuple[float, float]) -> None:
    ours, theirs, inputs, _ = filled(kind)
    second(ours, theirs, kind)
    for model in (ours, theirs):
        with quiet():
            model.add_weighted_adapter(["default", "second"], list(weights), "sum", combination_type="cat")
    expected = delta(ours, dict(zip(("default", "second"), weights, strict=True)))
    expect_close(deltas(ours, "sum"), expected)
    expect_close(deltas(theirs, "sum", peft.tuners.lora.LoraLayer), expected)
    assert {k: t.shape for k, t in ours.state_dict().items()} == {
        k: t.shape for k, t in theirs.state_dict().items()
    }
    ours.set_adapter("sum")
    theirs.set_adapter("sum")
    assert_close(output(ours, inputs), output(theirs, inputs))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", ["linear", "conv1d_of_transformers", "embedding", "conv2d"])
def test_svd(kind: str, rank: int | None) -> None:
    """The best approximation of a rank is one matrix, whatever factors give it."""
    ours, theirs, inputs, _ = filled(kind)
    second(ours, theirs, kind)
    names, weights = ["default", "second"], [0.7, -0.4]
    report = ours.add_weighted_adapter(names, weights, "sum", combination_type="svd", svd_rank=rank)
    with quiet():
        theirs.add_weighted_adapter(names, weights, "sum", combination_type="svd", svd_rank=rank)
    expect_close(deltas(ours, "sum"), deltas(theirs, "sum", peft.tuners.lora.LoraLayer))
    assert report.worst > 0.01 and set(report.ranks.values()) == {rank or 4}
    ours.set_adapter("sum")
    theirs.set_adapter("sum")
    assert_close(output(ours, inputs), output(theirs, inputs))


def test_svd_rank_above_the_layer() -> None:
    ours, theirs, _, _ = filled("linear")
    second(ours, theirs, "linear")
    names, weights = ["default", "second"], [0.7, -0.4]
    report = ours.add_weighted_adapter(names, weights, "sum", combination_type="svd", svd_rank=6)
    assert report.worst < OPS_SPECTRUM.rtol
    expect_close(deltas(ours, "sum"), delta(ours, dict(zip(names, weights, strict=True))))
    with pytest.raises(RuntimeError, match="shapes"):
        theirs.add_weighted_adapter(names, weights, "sum", combination_type="svd", svd_rank=6)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
@pytest.mark.parametrize("kind", ["linear", "conv1d_of_transformers", "embedding", "conv2d"])
def test_one_adapter_with_weight_one_is_itself(kind: str, combination: str) -> None:
    ours, theirs, inputs, _ = filled(kind)
    expected = output(ours, inputs)
    for model in (ours, theirs):
        with quiet():
            model.add_weighted_adapter(["default"], [1.0], "same", combination_type=combination)
        model.set_adapter("same")
        assert_close(output(model, inputs), expected)


def test_linear_of_two() -> None:
    ours, theirs, _, _ = filled("linear")
    second(ours, theirs, "linear", r=4)
    expected = delta(ours, {"default": 1.0, "second": -1.0})
    for model in (ours, theirs):
        with quiet():
            model.add_weighted_adapter(["default", "second"], [1.0, -1.0], "sum", combination_type="linear")
    expect_close(deltas(ours, "sum"), expected)
    its = deltas(theirs, "sum", peft.tuners.lora.LoraLayer)
    assert all((its[p] - expected[p]).norm() > 0.3 * expected[p].norm() for p in expected)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_rslora(combination: str) -> None:
    ours, theirs, inputs, _ = filled("linear", use_rslora=True)
    expected = output(ours, inputs)
    for model in (ours, theirs):
        model.add_weighted_adapter(["default"], [1.0], "same", combination_type=combination)
        model.set_adapter("same")
    assert_close(output(ours, inputs), expected)
    assert (output(theirs, inputs) - expected).abs().max() > 0.1


def test_a_combined_adapter_saves_and_loads_in_the_reference(tmp_path: Any) -> None:
    case = KINDS["linear"]
    base, inputs = case.build().eval(), case.inputs()
    ours, theirs = both(lambda: base, config("linear", "both_patterns_rslora"))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    second(ours, theirs, "linear", target_modules=["second"], rank_pattern={"layers.0.second": 3})
    ours.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", combination_type="cat")
    ours.set_adapter("sum")
    ours.save_pretrained(tmp_path, selected_adapters=["sum"])
    there = peft.PeftModel.from_pretrained(base, str(tmp_path / "sum")).eval()
    assert_close(output(there, inputs), output(ours, inputs))


def test_every_broken_thing_has_its_test() -> None:
    assert {f"test_{name}" for name in BROKEN} <= set(globals())


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
@pytest.mark.parametrize("vote", ["total", "frequency"])
@pytest.mark.parametrize(
    "form", ["ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]
)
def test_trimmed_and_voted_combinations_are_the_references(
    kind: str, vote: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(probability: Tensor) -> Tensor:
        # The reference draws unused factors in between, so a seed would not give both the same entries.
        return (torch.arange(probability.numel()) % 3 > 0).to(probability).view_as(probability)

    monkeypatch.setattr(torch, "bernoulli", draw)
    ours, theirs, *_ = filled(kind, r=3, lora_alpha=7)
    second(ours, theirs, kind, r=3, lora_alpha=2)
    how: dict[str, Any] = {"combination_type": form, "density": 0.6, "majority_sign_method": vote}
    if form.endswith("svd"):
        how["svd_rank"] = 3
    for model in (theirs, ours):
        with quiet():
            model.add_weighted_adapter(["default", "second"], [0.7, -1.2], "sum", **how)
    expected = {n: m.get_delta_weight("sum") for n, m in theirs.base_model.named_modules() if is_layer(m)}
    got = {n: m.get_delta_weight("sum") for n, m in ours.base_model.named_modules() if is_layer(m)}
    assert expected.keys() == got.keys() and expected
    for name, delta in expected.items():
        assert_close(got[name], delta, OPS_SPECTRUM)


def is_layer(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
