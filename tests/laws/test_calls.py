"""What a call computes is decided when it starts, in its own thread; other threads have no influence."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import checkpointing
from tests.checkpointing import Checkpointed
from tests.laws.cases import train
from tests.laws.special_models import SPECIAL, Special
from tests.laws.test_special_layers import adapted as adapted_special
from tests.laws.test_special_layers import base as base_of
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, RoutingError, get_peft_model
from veneer.layers import LoraLayer
from veneer.routing import BASE, disabled

ROWS = ["a", BASE, "b", "a"]


class Net(nn.Module):
    """A linear, an embedding, a convolution, and a head that adapters train whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, length) -> (n, length, 8)."""
        x = torch.tanh(self.body(self.embed(x)))
        return self.norm(self.conv(x.mT).mT)  # type: ignore[no-any-return]


def two_adapters() -> PeftModel:
    torch.manual_seed(0)
    options = {"target_modules": ["embed", "body", "conv"], "modules_to_save": ["norm"]}
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=3, **options), "a")
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=7, use_dora=True, **options))
    for seed, name in enumerate("ab"):
        train(model, name, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.get_base_model().norm.adapter_parameters(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


IDS = torch.arange(20).view(4, 5) % 11


@pytest.fixture
def outputs() -> tuple[PeftModel, Tensor, Tensor, Tensor]:
    """A model, and what it gives: adapted, its base, and with a row for each adapter."""
    model = two_adapters()
    plain, rows = model(IDS), model(IDS, adapter_names=ROWS)
    model.base_model.disable_adapter_layers()
    base = model(IDS)
    model.base_model.enable_adapter_layers()
    assert not torch.allclose(plain, base) and not torch.allclose(plain, rows)
    return model, plain.detach(), base.detach(), rows.detach()


def elsewhere(function: Callable[[], Any]) -> Any:
    """What a function gives in a thread of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def close_them(*contexts: AbstractContextManager[None]) -> None:
    for context in contexts:
        context.__exit__(None, None, None)


def test_contexts_may_end_in_any_order(outputs: tuple[PeftModel, Tensor, Tensor, Tensor]) -> None:
    model, plain, base, _ = outputs
    draw = random.Random(0)
    open_now: list[AbstractContextManager[None]] = []
    for _ in range(60):
        if not open_now or (len(open_now) < 4 and draw.random() < 0.5):
            open_now.append(model.disable_adapter())
            open_now[-1].__enter__()
        else:
            close_them(open_now.pop(draw.randrange(len(open_now))))
        assert torch.equal(model(IDS), base if open_now else plain)
    close_them(*open_now)
    assert torch.equal(model(IDS), plain)


def test_generators_hold_contexts_open(outputs: tuple[PeftModel, Tensor, Tensor, Tensor]) -> None:
    model, plain, base, _ = outputs

    def asking() -> Iterator[Tensor]:
        with model.disable_adapter():
            while True:
                yield model(IDS)

    first, second = asking(), asking()
    assert torch.equal(next(first), base) and torch.equal(next(second), base)
    del first
    gc.collect()
    assert torch.equal(next(second), base) and torch.equal(model(IDS), base)
    second.close()
    assert torch.equal(model(IDS), plain)


def test_an_error_closes_its_context_only(outputs: tuple[PeftModel, Tensor, Tensor, Tensor]) -> None:
    model, plain, base, _ = outputs
    with model.disable_adapter():
        with pytest.raises(IndexError), model.disable_adapter():
            model(IDS + 100)
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), plain)


def test_a_context_that_ends_in_another_thread(outputs: tuple[PeftModel, Tensor, Tensor, Tensor]) -> None:
    model, plain, base, _ = outputs
    context, still = model.disable_adapter(), model.disable_adapter()
    context.__enter__()
    still.__enter__()
    elsewhere(lambda: close_them(context))
    assert torch.equal(model(IDS), base)
    elsewhere(lambda: close_them(still))
    assert torch.equal(model(IDS), plain)


def test_a_thread_that_starts_in_a_context_has_none(
    outputs: tuple[PeftModel, Tensor, Tensor, Tensor],
) -> None:
    model, plain, base, rows = outputs
    with model.disable_adapter():
        assert torch.equal(elsewhere(lambda: model(IDS)), plain)
        assert torch.equal(elsewhere(lambda: model(IDS, adapter_names=ROWS)), rows)
        assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS, adapter_names=ROWS), base)


def test_what_is_disabled_for_good_is_so_in_every_thread(
    outputs: tuple[PeftModel, Tensor, Tensor, Tensor],
) -> None:
    model, plain, base, _ = outputs
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        assert torch.equal(elsewhere(lambda: model(IDS)), base)
    assert torch.equal(model(IDS), base)
    with model.disable_adapter():
        model.base_model.enable_adapter_layers()
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), plain)


def test_each_call_of_many_threads_is_its_own(outputs: tuple[PeftModel, Tensor, Tensor, Tensor]) -> None:
    model, plain, base, rows = outputs
    wrong: list[str] = []
    begin = threading.Barrier(5)

    def live(seed: int) -> None:
        draw, open_now = random.Random(seed), []
        begin.wait()
        for _ in range(60):
            choice = draw.random()
            if choice < 0.25 and len(open_now) < 3:
                open_now.append(model.disable_adapter())
                open_now[-1].__enter__()
            elif choice < 0.5 and open_now:
                close_them(open_now.pop(draw.randrange(len(open_now))))
            elif choice < 0.75:
                if not torch.equal(model(IDS), base if open_now else plain):
                    wrong.append(f"plain, {len(open_now)} contexts")
            elif not torch.equal(model(IDS, adapter_names=ROWS), base if open_now else rows):
                wrong.append(f"rows, {len(open_now)} contexts")
        close_them(*open_now)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with torch.no_grad():
            threads = [threading.Thread(target=live, args=(seed,)) for seed in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    assert torch.equal(model(IDS), plain)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in SPECIAL.items()])
@pytest.mark.parametrize("merged", [False, True])
def test_every_special_layer_asks_its_own_thread(case: Special, merged: bool) -> None:
    model, x = adapted_special(case), case.x()
    if merged:
        model.merge_adapter()
    expected, base = model(x), base_of(case)(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
        assert torch.equal(elsewhere(lambda: model(x)), expected)
    assert torch.equal(model(x), expected)


def test_what_code_around_the_model_reads_follows_the_context() -> None:
    model = adapted_special(SPECIAL["tokens"])
    embed = model.get_base_model().embed
    with model.disable_adapter():
        assert torch.equal(embed.weight, embed.original_module.weight)
        assert embed.disable_adapters and not elsewhere(lambda: embed.disable_adapters)
        assert not any(layer.enabled for layer in model.get_layer_status())
    assert not torch.equal(embed.weight, embed.original_module.weight)
    two = two_adapters()
    norm = two.get_base_model().norm
    with two.disable_adapter():
        assert norm.weight is norm.original_module.weight
    assert norm.weight is norm.modules_to_save["a"].weight


def test_another_model_is_not_concerned(outputs: tuple[PeftModel, Tensor, Tensor, Tensor]) -> None:
    model, plain, base, _ = outputs
    other = two_adapters()
    with model.disable_adapter():
        assert torch.equal(other(IDS), plain)
        twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(IDS), plain) and torch.equal(again(IDS), plain)
        with other.disable_adapter():
            assert torch.equal(twin(IDS), plain)
    with twin.disable_adapter():
        assert torch.equal(twin(IDS), base) and torch.equal(model(IDS), plain)


def test_an_adapter_that_comes_in_a_context_waits_for_its_end() -> None:
    model = get_peft_model(Net(), LoraConfig(target_modules=["body"], init_lora_weights=False), "a")
    base = model.unload()
    expected = base(IDS)
    model = get_peft_model(base, LoraConfig(target_modules=["body"], init_lora_weights=False), "a")
    with model.disable_adapter():
        model.add_adapter("b", LoraConfig(target_modules=["conv"], init_lora_weights=False))
        model.set_adapter("b")
        assert torch.equal(model(IDS), expected)
    assert not torch.allclose(model(IDS), expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS), expected)


def test_a_replica_of_data_parallel_is_what_the_calling_thread_sees(
    outputs: tuple[PeftModel, Tensor, Tensor, Tensor],
) -> None:
    model, *_ = outputs
    layer = model.get_base_model().body
    x = torch.randn(3, 8)
    expected, base = layer(x), layer.base_layer(x)
    with model.disable_adapter():
        replica = layer._replicate_for_data_parallel()
        whole = model.get_base_model().norm._replicate_for_data_parallel()
    for made in (replica, whole):
        assert made.disable_adapters and elsewhere(lambda made=made: made.disable_adapters)
    assert not layer.disable_adapters
    # What DataParallel does after it: children are put in, and each replica runs in a thread of its own.
    replica.base_layer, replica.lora_A, replica.lora_B = layer.base_layer, layer.lora_A, layer.lora_B
    assert torch.equal(elsewhere(lambda: replica(x)), base)
    assert torch.equal(layer(x), expected)


# -- computed again in a backward ----------------------------------------------------------------------


def llama() -> PeftModel:
    model = get_peft_model(checkpointing.llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    train(model, "default")
    return model.train()


def inputs_of(model: PeftModel) -> Tensor:
    return model.get_input_embeddings()(IDS).detach().requires_grad_()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("threaded", [True, False])
def test_the_models_own_checkpointing_computes_the_same_again(
    reentrant: bool, inside: bool, threaded: bool
) -> None:
    model = llama()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        adapted, resting = inputs_of(model), inputs_of(model)
        loss = model(inputs_embeds=adapted).logits.square().sum()
        with model.disable_adapter():
            loss = loss + model(inputs_embeds=resting).logits.square().sum()
            if inside:
                backward(loss)
        if not inside:
            backward(loss)
        return [adapted.grad, resting.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    def backward(loss: Tensor) -> None:
        elsewhere(loss.backward) if threaded else loss.backward()

    expected = gradients()
    assert all(gradient is not None for gradient in expected)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    functions = {m: vars(m).get("_gradient_checkpointing_func") for m in model.modules()}
    for actual, gradient in zip(gradients(), expected, strict=True):
        assert actual is not None and gradient is not None
        assert_close(actual, gradient)
    assert functions == {m: vars(m).get("_gradient_checkpointing_func") for m in model.modules()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_that_does_not_know_of_its_context_is_refused(reentrant: bool) -> None:
    model = get_peft_model(Checkpointed(reentrant), LoraConfig(r=2, target_modules=["inner"]))
    train(model, "default")
    x = torch.randn(3, 4, requires_grad=True)
    with model.disable_adapter():
        loss = model(x).sum()
        with pytest.raises(RoutingError, match="computed again in the backward"):
            loss.backward()
    del loss
    expected = torch.autograd.grad(model.get_base_model().inner(x).sum(), x)
    loss = model(x).sum()
    with model.disable_adapter():
        with torch.no_grad():
            model(x)
        loss.backward()  # a part of the call before, which had its adapters
    assert x.grad is not None
    assert_close(x.grad, expected[0])


def test_disabled_serves_what_no_peft_model_is_around() -> None:
    model = two_adapters().get_base_model()
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    with disabled(model):
        assert layer.disable_adapters
    assert not layer.disable_adapters
