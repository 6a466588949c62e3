"""The laws for what is adapted inside a model rather than as a layer of its own."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import IN_MODELS
from tests.laws.special_models import SPECIAL, Special
from tests.tolerances import BY_DTYPE, assert_close
from veneer import LoraConfig, PeftModel, VeneerWarning, get_peft_model, get_peft_model_state_dict
from veneer.adapters import AdapterSet

each = pytest.mark.parametrize("case", SPECIAL.values(), ids=SPECIAL.keys())
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def test_every_type_has_its_case() -> None:
    assert set(IN_MODELS.values()) <= set(SPECIAL)


def base(case: Special, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with the same values each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # Frozen, as an adapted model's base is: torch takes other kernels where a weight needs a gradient.
        model = case.build().eval().to(dtype).requires_grad_(False)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) * 0.4)
    return model


def adapted(case: Special, dtype: torch.dtype = torch.float32, *, trained: bool = True) -> PeftModel:
    model = get_peft_model(base(case, dtype), config(case))
    if trained:
        train(model, "default")
    return model.eval()


def config(case: Special, **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **case.options, **more})


@torch.no_grad()
def train(model: nn.Module, adapter: str, seed: int = 3) -> None:
    """Give an adapter values as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(AdapterSet(model).parameters(adapter)):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def close(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    tolerance = BY_DTYPE[expected.dtype]
    size = max(1.0, float(expected.detach().abs().max()))
    assert_close(actual, expected, tolerance._replace(atol=tolerance.atol * size * factor))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [n for n, t in actual.items() if not torch.equal(t, expected[n])] == []


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_adapter_is_an_identity(case: Special, dtype: torch.dtype) -> None:
    close(adapted(case, dtype, trained=False)(case.x()), base(case, dtype)(case.x()))


@each
def test_only_the_adapter_gets_gradients(case: Special) -> None:
    model = adapted(case).train()
    own = {id(p) for p in AdapterSet(model).parameters("default")}
    model(case.x()).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        assert (parameter.grad is not None) == (id(parameter) in own), name
        assert parameter.grad is None or parameter.grad.any(), name


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_equals_unmerged_and_unmerge_is_exact(case: Special, dtype: torch.dtype) -> None:
    model, x = adapted(case, dtype), case.x()
    expected, before = model(x), tensors(model)
    assert not torch.allclose(expected, base(case, dtype)(x))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*survives rounding", VeneerWarning)
        model.merge_adapter(safe_merge=True)
        close(model(x), expected, 8.0)
        with model.disable_adapter():
            assert torch.equal(model(x), base(case, dtype)(x))
        model.unmerge_adapter()
        same(tensors(model), before)
        assert torch.equal(model(x), expected)
        merged = model.merge_and_unload()
    close(merged(x), expected, 8.0)
    assert merged.state_dict().keys() == base(case).state_dict().keys()


@each
def test_merging_one_of_two_keeps_the_other(case: Special) -> None:
    model, x = adapted(case), case.x()
    model.add_adapter("second", config(case, **case.second))
    train(model, "second", seed=5)
    alone = model(x)
    model.set_adapter(["default", "second"])
    expected, before = model(x), tensors(model)
    assert not torch.allclose(expected, alone)
    for name in ("default", "second"):
        model.merge_adapter([name])
        close(model(x), expected)
        model.unmerge_adapter()
        same(tensors(model), before)
    model.set_adapter("default")
    assert torch.equal(model(x), alone)
    model.delete_adapter("second")
    assert torch.equal(model(x), alone)


@each
def test_disabled_and_unloaded_equal_the_base_bit_for_bit(case: Special) -> None:
    model, x = adapted(case), case.x()
    with model.disable_adapter():
        assert torch.equal(model(x), base(case)(x))
    model.merge_adapter()
    plain = model.unload()
    assert torch.equal(plain(x), base(case)(x))
    assert [(n, type(m)) for n, m in plain.named_modules()] == [
        (n, type(m)) for n, m in base(case).named_modules()
    ]
    same(tensors(plain), tensors(base(case)))


@each
def test_forward_writes_nothing(case: Special) -> None:
    model, x = adapted(case), case.x()
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {n: (t._version, t.data_ptr(), t.clone()) for n, t in held.items()}
    modules = [(n, id(m)) for n, m in model.named_modules()]
    model(x)
    model.train()(x).sum().backward()
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (version, pointer, value) in before.items():
        assert (after[name]._version, after[name].data_ptr()) == (version, pointer), name
        assert torch.equal(after[name], value), name


@each
def test_save_then_load_is_the_identity(case: Special, tmp_path: Path) -> None:
    model, x = adapted(case), case.x()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(case), tmp_path, is_trainable=True)
    same(get_peft_model_state_dict(again), get_peft_model_state_dict(model))
    assert torch.equal(again.eval()(x), model(x))
    again.load_adapter(tmp_path, "default")
    again.load_adapter(tmp_path, "twin")
    again.set_adapter("twin")
    assert torch.equal(again(x), model(x))


@each
def test_copies_are_independent(case: Special) -> None:
    model, x = adapted(case), case.x()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        train(twin, "default", seed=9)
        twin.merge_adapter()
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
    model.base_model.copy_adapter("default", "other")
    model.set_adapter("other")
    assert torch.equal(model(x), expected)
    model.base_model.rename_adapter("other", "new")
    assert torch.equal(model(x), expected)
