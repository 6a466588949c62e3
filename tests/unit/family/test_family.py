from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.laws.test_family import llama
from tests.tolerances import BY_DTYPE, FAMILY, assert_close
from tests.unit.family.tiny import CONFIG, family, text, weights
from veneer import Family, LoraConfig, PeftModel
from veneer.errors import (
    AdapterFileError,
    AdapterNameError,
    ConfigError,
    DataError,
    TargetError,
    TrainingError,
    UnknownOptionError,
    VeneerWarning,
)


def test_losses_fall_and_adapters_step_when_they_are_told_to() -> None:
    made = family("a", "b", learning_rate=0.05)
    batches = {"a": text(0), "b": text(1, rows=1, tokens=6)}
    first = made.forward_backward(batches)
    before = weights(made, "b")
    for _ in range(25):
        assert made.optim_step("a")["a"].taken
        last = made.forward_backward({"a": batches["a"]})
    assert last["a"].loss < 0.95 * first["a"].loss
    assert all(map(torch.equal, weights(made, "b"), before))
    step = made.optim_step()
    assert step["b"].step == 1 and step["b"].count == 3
    assert not all(map(torch.equal, weights(made, "b"), before))


def test_a_step_takes_the_mean_over_everything_since_the_last() -> None:
    """Rows at once, and one after another with different numbers of tokens."""
    whole, parts = family("a"), family("a")
    for made in (whole, parts):
        with torch.no_grad():
            for parameter in made.parameters("a"):
                parameter.fill_(0.01)
    batch = text(0)
    batch["labels"][0, 3:6] = -100
    one = {key: value[:1] for key, value in batch.items()}
    two = {key: value[1:] for key, value in batch.items()}
    for made in (whole, parts):  # without dropout, which is drawn anew for each batch
        for layer in made.model.base_model.layers().values():
            layer.lora_dropout["a"].p = 0.0
    whole.forward_backward({"a": batch})
    parts.forward_backward({"a": one})
    parts.forward_backward({"a": two})
    gathered = torch.cat([p.grad.flatten() for p in whole.parameters("a") if p.grad is not None])
    mean = gathered.norm() / 7
    steps = whole.optim_step()["a"], parts.optim_step()["a"]
    assert_close(torch.tensor(steps[0].grad_norm), mean, FAMILY)
    assert steps[0].count == steps[1].count == 7
    assert_close(torch.tensor(steps[1].grad_norm), torch.tensor(steps[0].grad_norm), FAMILY)
    for mine, expected in zip(weights(parts, "a"), weights(whole, "a"), strict=True):
        assert_close(mine, expected, FAMILY)


def test_optimizers_schedules_and_clipping_of_ones_own() -> None:
    made = family()
    made.add("sgd", CONFIG, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), max_grad_norm=None)
    made.add("short", CONFIG, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), max_grad_norm=1e-3)
    made.add(
        "scheduled",
        CONFIG,
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        learning_rate=1e-2,
    )
    batch = text()
    before = weights(made, "short")
    for expected in (1e-2, 5e-3):
        made.forward_backward(dict.fromkeys(made.names, batch))
        steps = made.optim_step()
        assert steps["scheduled"].learning_rate == pytest.approx(expected)
    moved = torch.stack([(a - b).norm() for a, b in zip(weights(made, "short"), before, strict=True)]).norm()
    assert steps["sgd"].grad_norm > 1e-2
    assert float(moved) <= 2 * 0.5 * 1e-3
    made.forward_backward({"sgd": batch})
    assert made.optim_step("sgd", learning_rate=0.25)["sgd"].learning_rate == 0.25


def test_a_gradient_that_is_no_number_is_dropped_and_said() -> None:
    made = family("a", "b")
    with torch.no_grad():
        made.parameters("a")[0].fill_(torch.nan)
    made.forward_backward({"a": text(), "b": text()})
    before = weights(made, "a")
    with pytest.warns(VeneerWarning, match="gradient of 'a' is not finite"):
        steps = made.optim_step()
    assert not steps["a"].taken and steps["b"].taken
    for mine, old in zip(weights(made, "a"), before, strict=True):
        assert torch.equal(mine.nan_to_num(), old.nan_to_num())
    made.forward_backward({"b": text()})
    with pytest.raises(TrainingError, match="'a' has no gradients"):
        made.optim_step(["b", "a"])
    assert made.optim_step().keys() == {"b"}
    with pytest.raises(TrainingError, match="no adapter has gradients"):
        made.optim_step()


def test_adapters_join_and_leave(tmp_path: Path) -> None:
    made = family("a")
    made.forward_backward({"a": text()})
    made.add("b", CONFIG, seed=1)
    made.forward_backward({"b": text()})
    made.optim_step()
    made.remove("a")
    assert made.names == ["b"]
    made.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "b")
    batch = text()
    with torch.no_grad():
        logits = loaded(**batch).logits
        mine = made.model(**batch, adapter_names=["b"] * 2).logits
    assert_close(mine, logits, FAMILY)


def test_forward_changes_nothing() -> None:
    made = family("a")
    generator = made.generator("a").get_state()
    losses = {made.forward({"a": text()})["a"].loss for _ in range(2)}
    assert len(losses) == 1
    assert all(parameter.grad is None for parameter in made.parameters("a"))
    assert torch.equal(made.generator("a").get_state(), generator)


def test_any_module_with_a_loss_of_the_callers() -> None:
    made = Family(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    made.add("a", LoraConfig(target_modules=["0", "2"], r=2), learning_rate=0.05)
    made.add("b", LoraConfig(target_modules=["2"], r=1), learning_rate=0.05)
    batches = {
        name: {
            "input": torch.randn(n, 4, generator=torch.Generator().manual_seed(n)),
            "target": torch.ones(n, 2),
        }
        for name, n in (("a", 3), ("b", 5))
    }

    def loss(output: Tensor, batch: Any) -> Tensor:
        assert output.shape == batch["target"].shape
        return nn.functional.mse_loss(output, batch["target"])

    first = made.forward_backward(batches, loss)
    for _ in range(20):
        made.optim_step()
        last = made.forward_backward(batches, loss)
    assert all(last[name].loss < first[name].loss for name in "ab")
    assert last["a"].logprobs is None


def test_results_of_threads_are_those_of_some_order() -> None:
    alone, shared = family("a", "b"), family("a", "b")

    def train(made: Family, name: str) -> None:
        for i in range(5):
            made.forward_backward({name: text(i)})
            made.optim_step(name)

    for name in "ab":
        train(alone, name)
    threads = [threading.Thread(target=train, args=(shared, name)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        assert all(map(torch.equal, weights(shared, name), weights(alone, name)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_same_when_it_is_recomputed(checkpointing: bool) -> None:
    made = family("a", "b")
    base: Any = made.model.get_base_model()
    with torch.no_grad():
        for name in "ab":
            for parameter in made.parameters(name):
                parameter.fill_(0.02)
    plain = family("a", "b")
    for mine, other in zip(made.parameters("a"), plain.parameters("a"), strict=True):
        other.data.copy_(mine)
    calls = []
    first = base.model.layers[0].self_attn
    first.register_forward_pre_hook(lambda module, args: calls.append(1))
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    made.forward_backward({"a": text(), "b": text(1)})
    plain.forward_backward({"a": text()})
    for mine, other in zip(made.parameters("a"), plain.parameters("a"), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert_close(mine.grad, other.grad, FAMILY)
    assert torch.equal(made.generator("a").get_state(), plain.generator("a").get_state())
    assert len(calls) == 1 + checkpointing


def test_autocast_gives_what_it_gives_alone() -> None:
    made, alone = family("a", "b"), family("a")
    for one in (made, alone):
        with torch.no_grad():
            for parameter in one.parameters("a"):
                parameter.fill_(0.02)
        with torch.autocast("cpu", torch.bfloat16):
            one.forward_backward({"a": text(), "b": text(1)} if one is made else {"a": text()})
    for mine, other in zip(made.parameters("a"), alone.parameters("a"), strict=True):
        assert mine.grad is not None and other.grad is not None and mine.grad.dtype == torch.float32
        scale = other.grad.abs().max()
        assert_close(mine.grad / scale, other.grad / scale, BY_DTYPE[torch.bfloat16])


@dataclass
class Seen:
    logits: Tensor
    total: Tensor
    layers: tuple[Tensor, ...]
    kind: str = "seen"


class Pair(NamedTuple):
    first: Tensor
    cache: object


class Giving(nn.Module):
    """A model whose output is an object of a kind, with what has rows and what has none."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        forms = {Seen: Seen(y, y.sum(), (y, y.mean())), Pair: Pair(y, object()), dict: {"y": y, "n": 3}}
        return {**forms, list: [y, y.sum()], Tensor: y, float: y.sum()}[self.kind]


@pytest.mark.parametrize("kind", [Seen, Pair, dict, list, Tensor])
def test_a_loss_of_the_callers_gets_the_rows_of_one_adapter_and_nothing_else(kind: type) -> None:
    made, found = Family(Giving(kind)), {}
    for name in "ab":
        made.add(name, LoraConfig(target_modules=["linear"], r=2))

    def loss(output: Any, batch: Any) -> Tensor:
        found[len(batch["x"])] = output
        if kind is Tensor:
            return output.sum()  # type: ignore[no-any-return]
        values = vars(output).values() if kind is Seen else output.values() if kind is dict else output
        (rows,) = [value for value in values if isinstance(value, Tensor)]
        return rows.sum()

    made.forward_backward({"a": {"x": torch.ones(1, 4)}, "b": {"x": torch.ones(2, 4)}}, loss)
    assert set(found) == {1, 2} and all(isinstance(output, kind) for output in found.values())
    if kind is Seen:
        assert len(found[2].logits) == len(found[2].layers[0]) == 2
        assert found[2].kind == "seen" and found[2].total is None and found[2].layers[1] is None
    elif kind is Pair:
        assert len(found[2].first) == 2 and found[2].cache is None
    elif kind is dict:
        assert len(found[2]["y"]) == 2 and found[2]["n"] == 3


def test_a_loss_of_the_callers_does_not_see_what_its_texts_are_filled_up_to() -> None:
    def loss(output: Any, batch: Any) -> tuple[Tensor, int]:
        logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
        assert logits.shape[:2] == labels.shape
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total, int((labels != -100).sum())

    made, batches = family("a", "b"), {"a": text(tokens=6), "b": text(1, tokens=9)}
    own, named = made.forward(batches, loss), made.forward(batches)
    for name in "ab":
        assert_close(torch.tensor(own[name].loss), torch.tensor(named[name].loss), FAMILY)


def test_what_has_no_rows_is_refused() -> None:
    made = Family(Giving(float))
    made.add("a", LoraConfig(target_modules=["linear"], r=2))
    with pytest.raises(DataError, match="has no row for each of the batch"):
        made.forward_backward({"a": {"x": torch.ones(2, 4)}}, lambda output, batch: output)


# -- states ------------------------------------------------------------------------------------------------


def test_a_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Also in the middle of what a step gathers, and in a process that has no adapters yet."""
    made = family("a", "b")
    made.forward_backward({"a": text(), "b": text(1)})
    made.optim_step()
    made.forward_backward({"a": text(2)})
    made.save_state(tmp_path)
    other = Family(llama())
    other.load_state(tmp_path)
    again = family("b", "a", seed=9)
    again.load_state(tmp_path)

    def on(one: Family) -> list[Any]:
        one.forward_backward({"a": text(3), "b": text(4)})
        steps = one.optim_step()
        said = one.sample({"a": [[1, 5]]}, max_tokens=3)
        return [steps["a"], steps["b"], said, *weights(one, "a"), *weights(one, "b")]

    expected = on(made)
    for one in (other, again):
        for mine, right in zip(on(one), expected, strict=True):
            assert torch.equal(mine, right) if isinstance(right, Tensor) else mine == right


def test_one_adapter_leaves_and_comes_back_while_another_goes_on(tmp_path: Path) -> None:
    made, stayed = family("a", "b"), family("a")
    for one in (made, stayed):
        one.forward_backward({name: text(i) for i, name in enumerate(one.names)})
        one.optim_step()
    made.save_state(tmp_path, ["b"])
    left = weights(made, "b")
    made.remove("b")
    for one in (made, stayed):
        one.forward_backward({"a": text(2)})
        one.optim_step()
    before = weights(made, "a")
    made.load_state(tmp_path)
    assert all(map(torch.equal, weights(made, "b"), left)) and made.names == ["a", "b"]
    assert all(map(torch.equal, weights(made, "a"), before))
    made.forward_backward({"b": text(3)})
    assert made.optim_step()["b"].step == 2
    with pytest.raises(AdapterNameError, match="no adapter is called 'c'"):
        made.save_state(tmp_path, ["c"])


def test_a_state_holds_nothing_of_another_adapter() -> None:
    made = family("a", "b")
    made.forward_backward({"a": text(), "b": text(1)})
    state = made._of("a").state()
    stored = [*state["parameters"], *(g for g in state["gradients"] if g is not None)]
    assert len(stored) == 2 * len(state["parameters"])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in stored)


def test_a_state_that_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    made = family("a")
    with pytest.raises(AdapterFileError, match="does not exist"):
        made.load_state(tmp_path)
    (tmp_path / "family.pt").write_bytes(b"no state")
    with pytest.raises(AdapterFileError, match="is not a state of a family"):
        made.load_state(tmp_path)
    torch.save({"a": {"config": "{}"}}, tmp_path / "family.pt")
    with pytest.raises(AdapterFileError, match="it lacks"):
        made.load_state(tmp_path)

    larger = Family(llama())
    larger.add("b", CONFIG)
    larger.add("a", LoraConfig(target_modules=["q_proj"], r=7))
    larger.save_state(tmp_path)
    before = weights(made, "a")
    with pytest.raises(AdapterFileError, match="'a' has other factors"):
        made.load_state(tmp_path)
    assert made.names == ["a"] and all(map(torch.equal, weights(made, "a"), before))

    own = Family(llama())
    own.add("c", CONFIG, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    own.save_state(tmp_path)
    with pytest.raises(AdapterFileError, match="optimizer or a schedule of its own"):
        made.load_state(tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------


def test_what_cannot_be_kept_apart_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match=r"1 \(BatchNorm1d\) has no running statistics"):
        Family(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))
    made = family()
    with pytest.raises(ConfigError, match="bias='all' trains the base's own biases"):
        made.add("a", LoraConfig(target_modules=["q_proj"], bias="all"))
    with pytest.raises(ConfigError, match="replaces weights of the base"):
        made.add(
            "a",
            LoraConfig(target_modules=["q_proj"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
        )
    with pytest.raises(ZeroDivisionError):
        made.add("a", CONFIG, optimizer=lambda parameters: 1 / 0)
    assert made.names == [] and not made.model.peft_config


def test_names_and_batches_that_do_not_fit() -> None:
    made = family("a", "b")
    with pytest.raises(AdapterNameError, match="no adapter is called 'c'; the family has 'a', 'b'"):
        made.forward_backward({"c": text()})
    with pytest.raises(AdapterNameError, match="no adapter is named"):
        made.forward_backward({})
    with pytest.raises(AdapterNameError):
        made.remove("c")
    with pytest.raises(UnknownOptionError, match="no loss is called 'mse'"):
        made.forward_backward({"a": text()}, "mse")
    with pytest.raises(UnknownOptionError, match="are for the losses of tokens"):
        made.forward_backward({"a": text()}, lambda output, batch: output.logits.sum(), low=0.1)
    with pytest.raises(DataError, match="'a' lacks labels"):
        made.forward_backward({"a": {"input_ids": text()["input_ids"]}, "b": text()})
    with pytest.raises(DataError, match=r"'a' lacks logprobs, advantages"):
        made.forward_backward({"a": text()}, "ppo")
    uneven = {**text(), "labels": text(rows=3)["labels"]}
    with pytest.raises(DataError, match="one shape"):
        made.forward_backward({"a": uneven})
    with pytest.raises(DataError) as refused:
        made.forward_backward(
            {"a": {"pixels": torch.zeros(2, 3)}, "b": {**text(), "position_ids": torch.zeros(3, 8).long()}},
            lambda output, batch: output.logits.sum(),
        )
    message = str(refused.value)
    assert "'a': none of pixels is an argument" in message and "same number of rows" in message
    with pytest.raises(DataError, match="make no batch"):
        made.forward_backward(
            {
                "a": {**text(), "inputs_embeds": torch.zeros(2, 8, 32)},
                "b": {**text(), "inputs_embeds": torch.zeros(2, 8, 16)},
            },
            lambda output, batch: output.logits.sum(),
        )
    with pytest.raises(DataError, match="position_ids is missing"):
        made.forward_backward(
            {"a": {**text(), "position_ids": torch.zeros(2, 8).long()}, "b": text()},
            lambda output, batch: output.logits.sum(),
        )
    assert all(parameter.grad is None for name in "ab" for parameter in made.parameters(name))


def test_a_gradient_that_two_parameters_share_is_scaled_once() -> None:
    """autograd may give two parameters one tensor."""
    made = family("a")
    trainee = made._of("a")
    one, two = [p for p in trainee.parameters if p.shape == trainee.parameters[0].shape][:2]
    shared = torch.ones_like(one)
    trainee.gather([shared if p is one or p is two else None for p in trainee.parameters], 4.0)
    assert made.optim_step()["a"].grad_norm == pytest.approx((2 * shared.numel()) ** 0.5 / 4.0)
    first, second = (made.optimizer("a").state[p]["exp_avg"] for p in (one, two))
    assert torch.equal(first, second)
