"""Adapters over quantised bases: the reference's files here, ours there; the same outputs and gradients."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.interop.reference import output, peft, quiet, randomise
from tests.interop.tiny import llama
from tests.storages import eight_bits, four_bits, half_quadratic, torchao
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from veneer.backends import find, prepare_backward, quantised

X = torch.arange(12).reshape(2, 6)
STORAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": lambda m: four_bits(m, compute_dtype=torch.float32),
    "fp4-plain-scales": lambda m: four_bits(m, quant_type="fp4", nested=False, compute_dtype=torch.float32),
    "int8": eight_bits,
    "torchao-int8": torchao,
    "hqq": half_quadratic,
}
OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "down_proj"]}
each = pytest.mark.parametrize("storage", STORAGES)


@contextmanager
def rounding_is_known() -> Iterator[None]:
    """Merges into codes may say that they round."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*survives rounding.*")
        yield


def base(storage: str) -> Any:
    """A small Llama with its blocks' linears in a storage, marked as transformers marks one it loaded so."""
    model = llama(hidden=64)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, STORAGES[storage](child))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "4" in storage, storage == "int8"
    prepare_backward(model)  # the layout that both compute alike with
    return model.eval()


@each
@pytest.mark.parametrize("dora", [False, True])
def test_the_same_files_and_outputs_both_ways(storage: str, dora: bool, tmp_path: Path) -> None:
    with quiet():
        theirs = peft.get_peft_model(base(storage), peft.LoraConfig(**OPTIONS, use_dora=dora)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(base(storage), tmp_path / "theirs").eval()
    expected = output(theirs, {"input_ids": X})
    assert_close(output(ours, {"input_ids": X}), expected)
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        back = peft.PeftModel.from_pretrained(base(storage), tmp_path / "ours").eval()
    assert torch.equal(output(back, {"input_ids": X}), expected)


@each
def test_training_takes_the_same_gradients(storage: str) -> None:
    models = []
    for library, config in ((peft, peft.LoraConfig), (None, LoraConfig)):
        made = peft.get_peft_model if library else get_peft_model
        with quiet():
            models.append(randomise(made(base(storage), config(**OPTIONS))).train())
    for model in models:
        model(input_ids=X, labels=X).loss.backward()
    theirs, ours = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in models)
    assert theirs.keys() == ours.keys() and len(ours) == 12
    for name, gradient in theirs.items():
        assert gradient.any()
        assert_close(ours[name], gradient)


@pytest.mark.parametrize("storage", ["nf4", "fp4-plain-scales", "int8"])
def test_one_merged_adapter_gives_the_same_codes(storage: str) -> None:
    with quiet():
        theirs = randomise(peft.get_peft_model(base(storage), peft.LoraConfig(**OPTIONS)))
    ours = randomise(get_peft_model(base(storage), LoraConfig(**OPTIONS)))
    with quiet():
        theirs.merge_adapter()
    with rounding_is_known():
        report = ours.merge_adapter()
    assert len(report.requantised) == 6
    for path in report.requantised:
        mine, other = (m.base_model.model.get_submodule(path).base_layer for m in (ours, theirs))
        step = find(mine).read(mine).abs().amax() / 7  # where the sums are equal to the last place, codes are
        assert ((find(mine).read(mine) - find(other).read(other)).abs() > step / 10).float().mean() < 0.01


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_preparing_for_training(
    upcast: bool, reentrant: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = base("nf4").to(torch.bfloat16)
    options = None if reentrant is None else {"use_reentrant": reentrant}
    with caplog.at_level(logging.INFO, "veneer.kbit"):
        given = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options, upcast=upcast)
    assert given is model and not any(p.requires_grad for p in model.parameters())
    (said,) = [r.getMessage() for r in caplog.records if r.name == "veneer.kbit"]
    assert "14 of" in said and "bnb 4bit" in said and "MB before" in said
    rest = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    assert rest == ({torch.float32} if upcast else {torch.bfloat16})
    if upcast:
        with quiet():
            theirs = peft.prepare_model_for_kbit_training(
                base("nf4").to(torch.bfloat16), use_gradient_checkpointing=False
            )
        assert {n: p.dtype for n, p in theirs.named_parameters()} == {
            n: p.dtype for n, p in model.named_parameters()
        }
    adapted = randomise(get_peft_model(model, LoraConfig(**OPTIONS))).train()
    plain = randomise(get_peft_model(prepared(upcast), LoraConfig(**OPTIONS))).train()
    for one in (adapted, plain):
        one(input_ids=X, labels=X).loss.backward()
    assert model.is_gradient_checkpointing
    for mine, other in zip(adapted.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is None or (reentrant and not upcast):
            continue  # without autograd the branch is computed in float32, so 16-bit outputs differ
        if reentrant:
            assert_close(mine.grad, other.grad)
        else:
            assert torch.equal(mine.grad, other.grad)


def prepared(upcast: bool) -> Any:
    """The same model without checkpointing."""
    return prepare_model_for_kbit_training(
        base("nf4").to(torch.bfloat16), use_gradient_checkpointing=False, upcast=upcast
    )


def test_a_model_that_is_not_quantised_is_only_frozen() -> None:
    model = llama()
    before = {n: p.dtype for n, p in model.named_parameters()}
    prepare_model_for_kbit_training(model)
    assert {n: p.dtype for n, p in model.named_parameters()} == before
    assert not model.is_gradient_checkpointing and not any(map(quantised, model.modules()))
    assert not any(p.requires_grad for p in model.parameters())
