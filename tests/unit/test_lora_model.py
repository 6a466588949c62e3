"""Merging a whole model: what stays as it was merged, and what a merge that fails late leaves behind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.laws.snapshots import Snapshot
from tests.storages import eight_bits, four_bits, torchao
from tests.tolerances import assert_close
from veneer import ConfigError, LoraConfig, MergeError, PeftModel, VeneerWarning, get_peft_model, merge
from veneer.layers import LoraLayer
from veneer.layers.trainable_tokens import TrainableTokens
from veneer.merge_report import MergeReport

IDS = torch.arange(12).reshape(2, 6)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(
    base: nn.Module | None = None, targets: Any = ("q_proj", "down_proj"), **options: Any
) -> PeftModel:
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": list(targets), "init_lora_weights": False, **options}
    )
    return get_peft_model(base or llama(), config, "a").eval()


def with_b(model: PeftModel, targets: Any = ("q_proj",), **options: Any) -> PeftModel:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, **options)
    model.add_adapter("b", config)
    model.set_adapter(["a", "b"])
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


# -- what is merged stays as it was --------------------------------------------------------------------


def change(model: PeftModel, what: str) -> None:
    if what == "strength":
        model.base_model.set_strength("a", 0.0)
        return
    with torch.no_grad():
        for layer in model.base_model.layers().values():
            for parameter in layer.adapter_parameters("a"):
                parameter.zero_()


@pytest.mark.parametrize("what", ["strength", "factors"])
def test_merging_another_leaves_what_is_merged_as_it_was_merged(what: str) -> None:
    # Two layers hold "a", one of them "b" too: with half of the change the model would be neither.
    model = with_b(adapted(llama(torch.bfloat16)))
    layers = model.base_model.layers()
    before = {path: layer.base_layer.weight.detach().clone() for path, layer in layers.items()}
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*survives rounding.*")
        model.merge_adapter(["a"])
        change(model, what)
        model.merge_adapter(["b"])
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, before[path]) for path, layer in layers.items())
    assert (logits(model) - expected).abs().max() > 0.01  # unmerged, the change counts


@pytest.mark.parametrize("what", ["strength", "factors"])
def test_so_does_merging_another_for_good(what: str) -> None:
    model = with_b(adapted())
    expected = logits(model)
    model.merge_adapter(["a"])
    change(model, what)
    with pytest.warns(VeneerWarning, match="'a' was merged before and stays merged"):
        plain = model.merge_and_unload(adapter_names=["b"])
    assert_close(logits(plain), expected)


@pytest.mark.parametrize("kind", ["bfloat16", torch.int8])
def test_merging_into_no_floating_type_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="dequantize must be a boolean or a floating-point type, got"):
        adapted().merge_and_unload(dequantize=kind)


def test_so_does_taking_out_the_other() -> None:
    model = adapted()
    alone = logits(model)
    with_b(model)
    model.merge_adapter(["a", "b"])
    change(model, "strength")
    with pytest.warns(VeneerWarning, match="unmerging 'b'"):
        model.set_adapter("a")
    assert_close(logits(model), alone)


def test_so_does_deleting_an_adapter_that_trains_biases() -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model = adapted(base, ["0", "1"])
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], bias="all"))
    x = torch.randn(3, 6)
    expected = model(x)
    model.merge_adapter(["a"])
    change(model, "strength")
    with torch.no_grad():
        base[0].base_layer.bias.add_(1.0)
    model.delete_adapter("b")
    assert model.base_model.layers()["0"].merged_adapters == ["a"]
    assert_close(model(x), expected)


def test_what_was_kept_of_layers_that_are_merged_already_stands_in_the_next_report() -> None:
    model = adapted()
    first = model.merge_adapter()
    with pytest.warns(VeneerWarning, match="stays as it was merged"):
        assert model.merge_adapter().kept == first.kept
    model.merge_and_unload()
    assert model.base_model.merge_report.kept == first.kept


# -- failures half-way ---------------------------------------------------------------------------------


@contextmanager
def stopping(patch: pytest.MonkeyPatch, after: int, error: BaseException) -> Iterator[None]:
    """Layers after so many stop in the middle of being written."""
    done, write = 0, merge.merge_updates

    def merge_updates(*args: Any) -> float:
        nonlocal done
        kept = write(*args)
        done += 1
        if done > after:
            raise error
        return kept

    with patch.context() as context:
        context.setattr(merge, "merge_updates", merge_updates)
        yield


FAILURES = [RuntimeError("out of memory"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=["error", "interrupt"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_merge_that_fails_late_leaves_every_tensor_and_tie_as_it_was(
    monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException
) -> None:
    model = adapted(llama(torch.bfloat16), ["q_proj", "lm_head"])
    base = model.get_base_model()
    before, expected = Snapshot(model), logits(model)
    with stopping(monkeypatch, after, error), pytest.raises(type(error)) as caught:
        model.merge_adapter(untie=True)
    assert caught.value is error
    before.assert_same(model, written=True)
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    assert base.config.tie_word_embeddings
    assert torch.equal(logits(model), expected)
    model.merge_adapter(untie=True)
    assert base.lm_head.base_layer.weight is not base.model.embed_tokens.weight
    assert not base.config.tie_word_embeddings


def test_an_adapter_merged_over_another_is_taken_back_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_b(adapted(llama(torch.bfloat16)), ["q_proj", "down_proj"])
    original = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*survives rounding.*")
        model.merge_adapter(["a"])
    before = Snapshot(model)
    with stopping(monkeypatch, 1, FAILURES[0]), pytest.raises(RuntimeError):
        model.merge_adapter(["b"])
    before.assert_same(model, written=True)
    model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("error", FAILURES, ids=["error", "interrupt"])
def test_trained_rows_too(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    model = adapted(targets=["down_proj"], trainable_token_indices=[3, 5])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TrainableTokens):
                module.rows("a").add_(1.0)
    before, expected = Snapshot(model), logits(model)
    with stopping(monkeypatch, 1, error), pytest.raises(type(error)):
        model.merge_adapter(untie=True)
    before.assert_same(model, written=True)
    assert torch.equal(logits(model), expected)
    model.merge_adapter(untie=True)
    assert_close(logits(model), expected)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_for_good_names_the_layers_that_stay_merged_and_can_go_on(
    monkeypatch: pytest.MonkeyPatch, after: int, dtype: torch.dtype
) -> None:
    model = adapted(llama(dtype), targets=["q_proj", "lm_head"])
    base, expected = model.get_base_model(), logits(model)
    tied = Snapshot(model)
    with stopping(monkeypatch, after, FAILURES[0]), pytest.raises((MergeError, RuntimeError)) as caught:
        model.merge_and_unload(untie=True)
    merged = [path for path, layer in model.base_model.layers().items() if layer.merged]
    # Where one operation writes a weight there is no copy of it: a failure right after it comes too late.
    assert len(merged) == after + (dtype == torch.float32)
    if merged:
        assert isinstance(caught.value, MergeError) and caught.value.__cause__ is FAILURES[0]
        assert all(path in str(caught.value) for path in merged) and "out of memory" in str(caught.value)
    else:
        assert caught.value is FAILURES[0]
        tied.assert_same(model, written=True)
    # The head comes last: it was not written, so it is tied again.
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    assert base.config.tie_word_embeddings
    assert_close(logits(model), expected)
    if merged:
        with pytest.raises(MergeError, match="load the base again"), model.disable_adapter():
            logits(model)
        with pytest.raises(MergeError, match="load the base again"):
            model.unload()
        with pytest.raises(MergeError, match="load the base again"):
            model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*survives rounding.*")
        plain = model.merge_and_unload(untie=True)
    assert_close(logits(plain), expected)
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())


def test_an_interrupted_merge_for_good_says_so_and_is_still_an_interruption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(llama(torch.bfloat16))
    expected = logits(model)
    with (
        stopping(monkeypatch, 1, FAILURES[1]),
        pytest.warns(VeneerWarning, match="1 of 4 layers are merged by now"),
        pytest.raises(KeyboardInterrupt),
    ):
        model.merge_and_unload()
    assert_close(logits(model), expected)


def test_an_adapter_can_be_saved_after_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = adapted()
    expected = logits(model)
    with stopping(monkeypatch, 1, FAILURES[0]), pytest.raises(MergeError):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "a").eval()), expected)


def test_after_merge_adapter_nothing_is_left_that_could_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    expected = logits(model)
    model.merge_adapter()
    with stopping(monkeypatch, 0, FAILURES[0]):
        assert_close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("store", [four_bits, eight_bits, torchao], ids=["nf4", "int8", "torchao"])
@pytest.mark.parametrize("door", ["merge_adapter", "merge_and_unload", "dequantize"])
def test_quantised_modules_are_the_same_again(monkeypatch: pytest.MonkeyPatch, store: Any, door: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(*(store(nn.Linear(64, 64).requires_grad_(False).eval()) for _ in range(3)))
    model = adapted(base.eval(), ["0", "1", "2"])
    x = torch.randn(2, 64)
    expected = model(x)
    before = Snapshot(model)
    call = model.merge_adapter if door == "merge_adapter" else model.merge_and_unload
    options = {"dequantize": True} if door == "dequantize" else {}
    with stopping(monkeypatch, 1, FAILURES[0]), pytest.raises(RuntimeError, match=r"^out of memory$"):
        call(**options)
    before.assert_same(model, written=True)
    assert torch.equal(model(x), expected)


# -- what is not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_layer_whose_adapter_is_not_finite_is_named_before_anything_changes(
    door: str, value: float
) -> None:
    model = adapted()
    layers = model.base_model.layers()
    wrong = [path for path in layers if "q_proj" in path]
    with torch.no_grad():
        for path in wrong:
            layers[path].lora_A["a"].weight[0, 0] = value
    before = Snapshot(model)
    with pytest.raises(MergeError) as caught:
        getattr(model, door)()
    assert all(f"{path}: 'a' holds values that are NaN or infinite" in str(caught.value) for path in wrong)
    before.assert_same(model)


def test_rows_that_are_not_finite() -> None:
    model = adapted(targets=["down_proj"], trainable_token_indices=[3])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TrainableTokens):
                module.rows("a")[0, 0] = math.nan
    with pytest.raises(MergeError, match="the rows of 'a' would be NaN or infinite"):
        model.merge_adapter(untie=True)


def test_nothing_is_said_to_be_kept_where_the_base_is_not_finite() -> None:
    model = adapted(llama(torch.bfloat16))
    path, layer = next(iter(model.base_model.layers().items()))
    with torch.no_grad():
        layer.base_layer.weight[0, 0] = math.nan
    with pytest.warns(VeneerWarning, match=f"merged weights of {path} hold NaN or infinity"):
        report = model.merge_adapter()
    assert report.undefined == [path] and math.isnan(report.worst) and math.isnan(report.mean)
    assert "1 of them hold NaN or infinity now" in str(report) and "kept" not in str(report)


def test_a_report_is_undefined_whatever_the_order() -> None:
    for kept in ({"x": math.nan, "y": 0.5}, {"y": 0.5, "x": math.nan}):
        assert math.isnan(MergeReport(kept).worst)
