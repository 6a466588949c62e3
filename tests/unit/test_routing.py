"""Mixed batches of whole models: names and rows, generation, checkpointing, refusals."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from tests import checkpointing
from tests.checkpointing import Checkpointed
from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, RoutingError, get_peft_model
from veneer.ops import mixed_batch
from veneer.ops.token_rows import LOST, Tokens
from veneer.routing import BASE, Routing

NAMES = ["a", BASE, "b", "a"]


def llama(**more: Any) -> PeftModel:
    return adapted(checkpointing.llama(), **more)


def adapted(base: nn.Module, **more: Any) -> PeftModel:
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, **options), "a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=7, **options))
    for seed, name in enumerate("ab"):
        train(model, name, seed)
    return model.eval()


def ids(rows: int = 4) -> Tensor:
    return torch.randint(1, 31, (rows, 6), generator=torch.Generator().manual_seed(1))


def each_by_itself(model: PeftModel, x: Tensor) -> Tensor:
    rows = []
    for row, name in enumerate(NAMES):
        if name == BASE:
            with model.disable_adapter():
                rows.append(model(x[row : row + 1]).logits)
        else:
            model.set_adapter(name, inference_mode=True)
            rows.append(model(x[row : row + 1]).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_rows_are_what_they_are_alone(more: dict[str, Any]) -> None:
    model = llama(**more)
    assert_close(model(ids(), adapter_names=NAMES).logits, each_by_itself(model, ids()))


def test_which_adapters_are_active_does_not_matter_and_stays() -> None:
    model = llama()
    first = model(ids(), adapter_names=NAMES).logits
    model.set_adapter("b")
    assert torch.equal(model(ids(), adapter_names=NAMES).logits, first)
    assert model.active_adapters == ["b"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generating(options: dict[str, Any]) -> None:
    model, x = llama(), ids()
    common = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(3)
    mixed = model.generate(input_ids=x, adapter_names=NAMES, **common, **options)
    if options.get("do_sample"):
        assert mixed.shape[0] == 8  # what is drawn depends on the batch
        return
    for row, name in enumerate(NAMES):
        alone = model.generate(input_ids=x[row : row + 1], adapter_names=[name], **common, **options)
        assert torch.equal(mixed[row], alone[0])


def test_generating_puts_factors_together_once_and_lets_go_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = llama(), []

    def noted(make: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            found = make(*args)
            made.append(weakref.ref(found[0]))
            return found

        return function

    monkeypatch.setattr(mixed_batch, "stacked", noted(mixed_batch.stacked))
    layers = len(model.base_model.layers())
    model.generate(input_ids=ids(), adapter_names=NAMES, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    assert 0 < len(made) <= 2 * layers, "for the prompt, and once for all tokens"
    assert not [ref for ref in made if ref() is not None]


def test_generating_with_an_encoder() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = adapted(T5ForConditionalGeneration(config), task_type="SEQ_2_SEQ_LM")
    common = {"max_new_tokens": 5, "num_beams": 2}
    mixed = model.generate(input_ids=ids(), adapter_names=NAMES, **common)
    for row, name in enumerate(NAMES):
        alone = model.generate(input_ids=ids()[row : row + 1], adapter_names=[name], **common)
        assert torch.equal(mixed[row][: alone.shape[1]], alone[0])


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids(), adapter_names=NAMES).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_models_own_checkpointing_recomputes_with_the_same_rows(reentrant: bool) -> None:
    model = llama().train()
    for name in "ab":
        for parameter in model.base_model.index.parameters(name):
            parameter.requires_grad_(True)
    expected = gradients(model)
    assert {name.split(".")[-2] for name in expected} == {"a", "b"}
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    before = [m.__dict__.get("_gradient_checkpointing_func") for m in base.modules()]
    actual = gradients(model)
    assert [m.__dict__.get("_gradient_checkpointing_func") for m in base.modules()] == before
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_without_the_rows_is_refused(reentrant: bool) -> None:
    model = adapted(Checkpointed(reentrant), task_type=None)
    x = torch.randn(4, 4, requires_grad=True)
    loss = model(x, adapter_names=NAMES).sum()
    with pytest.raises(RoutingError, match="computed again in the backward"):
        loss.backward()
    del loss
    model(x).sum().backward()  # an ordinary forward is not affected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "c", "a"], r"no adapter named 'c'; there are: 'a', 'b', '__base__'"),
        (["a", "b"], r"has 2 names, but the input of .* has 4 rows"),
        ([], "it is empty"),
        ("aabb", "a list of names"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Any, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        llama()(ids(), adapter_names=names)


def test_what_cannot_be_mixed_is_refused() -> None:
    model = llama()
    model.merge_adapter(["b"])
    with pytest.raises(RoutingError, match="'b' is merged into the weights"):
        model(ids(), adapter_names=NAMES)
    torch.manual_seed(0)
    biased = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], bias="all"), "a")
    with pytest.raises(RoutingError, match="trains biases of the base itself"):
        biased(torch.randn(1, 4), adapter_names=["a"])


def test_a_failing_forward_leaves_no_routing_behind() -> None:
    model = llama()
    expected = model(ids()).logits
    with pytest.raises(IndexError):
        model(ids() + 1000, adapter_names=NAMES)
    assert torch.equal(model(ids()).logits, expected)


def test_another_thread_is_not_affected() -> None:
    model = llama()
    model.set_adapter("a")
    expected, seen, begun = model(ids()).logits, [], []
    inside = model.get_base_model().model.layers[0].mlp

    def elsewhere(*_: Any) -> None:
        if not begun:
            begun.append(True)
            thread = threading.Thread(target=lambda: seen.append(model(ids()).logits))
            thread.start()
            thread.join()

    handle = inside.register_forward_pre_hook(elsewhere)
    model(ids(), adapter_names=NAMES)
    handle.remove()
    assert torch.equal(seen[0], expected)


def test_another_thread_names_rows_of_its_own() -> None:
    model, seen = llama(), []
    expected, others = model(ids(), adapter_names=NAMES).logits, NAMES[::-1]
    inside = model.get_base_model().model.layers[0].mlp

    def elsewhere(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: seen.append(model(ids(), adapter_names=others).logits))
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive(), "it waits for the call of this one"

    handle = inside.register_forward_pre_hook(elsewhere)
    assert torch.equal(model(ids(), adapter_names=NAMES).logits, expected)
    assert torch.equal(seen[0], model(ids(), adapter_names=others).logits)


def test_adapters_that_are_disabled_stay_so() -> None:
    model = llama()
    with model.disable_adapter():
        base = model(ids()).logits
        assert torch.equal(model(ids(), adapter_names=NAMES).logits, base)


def test_compiled_models_follow_the_rows() -> None:
    model = llama()
    expected = each_by_itself(model, ids())
    model.set_adapter("a", inference_mode=True)
    plain = model(ids()).logits
    base = model.get_base_model()
    base.model.layers[0].mlp = torch.compile(base.model.layers[0].mlp, backend="eager")
    for _ in range(2):
        assert_close(model(ids(), adapter_names=NAMES).logits, expected)
        assert_close(model(ids()).logits, plain)


class Around(nn.Module):
    """A model of a text whose layers see other rows or positions than the text has."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.linear, self.change = nn.Embedding(9, 4), nn.Linear(4, 4), change

    def forward(self, input_ids: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
        return self.linear(self.change(self.embed(inputs if input_ids is None else input_ids)))


def invoked(change: Callable[[Tensor], Tensor]) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["linear"], alora_invocation_tokens=[1], init_lora_weights=False)
    return get_peft_model(Around(change), config).eval()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: torch.cat([x[:, :1], x], 1), "3 positions and that of .* 4: .* alora_offsets"),
        (
            lambda x: torch.cat([x, x, x])[:5],
            r"2 rows for the aLoRA 'default', and the input of .* \(5, 3, 4\)",
        ),
        (lambda x: x[:, None], r"2 rows for the aLoRA 'default', and the input of .* \(2, 1, 3, 4\)"),
    ],
)
def test_where_an_invoked_adapter_acts_is_never_guessed(
    change: Callable[[Tensor], Tensor], says: str
) -> None:
    text = torch.tensor([[1, 2, 3], [4, 1, 2]])
    invoked(lambda x: x)(text)
    with pytest.raises(RoutingError, match=says):
        invoked(change)(text)


def test_an_invoked_adapter_needs_a_text() -> None:
    with pytest.raises(RoutingError, match="needs input_ids or alora_offsets"):
        invoked(lambda x: x)(inputs=torch.tensor([[1, 2]]))


def test_a_layer_called_by_itself_takes_names_too() -> None:
    model = llama(modules_to_save=["model.norm"], trainable_token_indices=[1, 3])
    base = model.get_base_model()
    hidden = torch.randn(4, 6, base.config.hidden_size)
    for layer, x in (
        (base.model.layers[0].mlp.down_proj, torch.randn(4, 6, base.config.intermediate_size)),
        (base.model.norm, hidden),
        (base.model.embed_tokens, ids()),
    ):
        assert layer.held_adapters
        mixed = layer(x, adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            model.set_adapter([] if name == BASE else name, inference_mode=True)
            assert_close(mixed[row : row + 1], layer(x[row : row + 1]))
        assert torch.equal(layer(x, adapter_names=None), layer(x))


def test_an_attention_called_by_itself_takes_names_too() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    net = nn.ModuleDict({"attention": layer})
    model = adapted(net, target_modules=["attention"], task_type=None, init_lora_weights=False)
    x, attention = torch.randn(4, 3, 8), net["attention"]
    mixed, _ = attention(x, x, x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        model.set_adapter([] if name == BASE else name, inference_mode=True)
        alone = x[row : row + 1]
        assert_close(mixed[row : row + 1], attention(alone, alone, alone)[0])


def test_a_layer_refuses_names_that_are_none_of_its_own() -> None:
    layer = llama().get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(4, 6, layer.in_features)
    with pytest.raises(RoutingError, match="no adapter named 'c'; there are: 'a', 'b', '__base__'"):
        layer(x, adapter_names=["a", "c", "b", BASE])
    with pytest.raises(RoutingError, match="adapter_names has 2 names"):
        layer(x, adapter_names=["a", "b"])
    layer.merge(adapter_names=["a"])
    with pytest.raises(RoutingError, match="'a' is merged"):
        layer(x, adapter_names=NAMES)


def test_rows_of_a_bare_parameter_go_through_their_own_adapter() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    config = LoraConfig(r=2, target_modules=["1"], target_parameters=["0.weight"], init_lora_weights=False)
    model = get_peft_model(net, config, "a")
    model.add_adapter("b", config)
    x = torch.randn(4, 4)
    mixed = model(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        model.set_adapter([] if name == BASE else name, inference_mode=True)
        assert_close(mixed[row : row + 1], model(x[row : row + 1]))
    with pytest.raises(RoutingError, match=r"the input of 0\.weight has 8 rows"):
        model(x.repeat(2, 1), adapter_names=NAMES)


def test_tokens_are_taken_for_rows_only_where_that_is_known() -> None:
    routing = Routing(["a", "b"])
    assert routing.rows(4, ("a",), lambda: "experts", tokens=Tokens(2)) == ("a", "a", None, None)
    with pytest.raises(RoutingError, match="the input of gate has 4 rows"):
        routing.rows(4, ("a",), lambda: "gate")
    with pytest.raises(RoutingError, match="reaches gate is unknown"):
        routing.rows(2, ("a",), lambda: "gate", tokens=LOST)
    assert routing.rows(3, (), lambda: "gate", tokens=LOST) == (None,) * 3


@pytest.mark.parametrize("names", ["aabb", "abab", "abbcc", "abcbc", "cbabcabca"])
def test_rows_that_lie_adapter_by_adapter_go_back_to_their_places(names: str) -> None:
    routing, values, device = Routing(tuple(names)), torch.randn(len(names)), torch.device("cpu")
    laid = torch.cat([values[rows] for rows in routing.indices(tuple(names), device).values()])
    back = routing.back(tuple(names), device)
    assert torch.equal(laid if back is None else laid[back], values)
    assert (back is None) == torch.equal(laid, values)


class Sparse(nn.Module):
    """A mixture whose first expert is called with as many tokens as there are rows, both of the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[0], x[1]]) + self.experts[0](x[0, :2]).sum()


@pytest.mark.parametrize("training", [True, False])
def test_tokens_that_were_chosen_for_an_expert_are_never_taken_for_rows(training: bool) -> None:
    model = get_peft_model(Sparse(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "a")
    with (
        torch.set_grad_enabled(training),
        pytest.raises(RoutingError, match=r"reaches experts\.0 is unknown"),
    ):
        model(torch.randn(2, 3, 4), adapter_names=["a", BASE])


class Pooling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean(0)


def test_a_bare_parameter_that_gives_no_rows_is_refused() -> None:
    net = nn.Sequential(Pooling(4, 4))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"]), "a")
    with pytest.raises(RoutingError, match="gives no tensor with one row for each row"):
        model(torch.randn(2, 4), adapter_names=["a", BASE])
