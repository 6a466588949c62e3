"""A short form of the laws for one combination: an adapter on one layer in a model, from start to file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws import product
from tests.laws.cases import acting_everywhere
from tests.laws.product import PARAMETERS, Choice
from tests.laws.snapshots import Snapshot
from veneer import (
    LoraConfig,
    PeftModel,
    VeneerWarning,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from veneer.adapters import AdapterSet
from veneer.backends import find, prepare_backward
from veneer.errors import ConfigError, MergeError, TargetError
from veneer.testing import laws


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, target: nn.Module, attends: bool) -> None:
        super().__init__()
        self.target = target
        self.attends = attends

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives; attention attends to its own input."""
        if not self.attends:
            return self.target(x)
        result: Tensor = self.target(x, x, x, need_weights=False)[0]
        return result


class Trial:
    """One combination, with a model, an input, and what the base alone gives."""

    def __init__(self, choice: Choice, place: Path) -> None:
        self.choice, self.place = choice, place
        self.made = product.made(choice)
        self.x = self.made.x()
        self.reason = product.refusal(choice)

    def holder(self, dense: bool = False) -> Holder:
        """A model with the same values each time."""
        base = self.made.dense()
        target = base if dense else self.made.store(base)
        model = Holder(target, self.choice.layer in product.ATTENTION).eval()
        if self.choice.storage != "dense" and not dense and hasattr(target, "weight"):
            prepare_backward(target)
        return model

    def config(self) -> LoraConfig:
        """The adapter's configuration."""
        if self.choice.layer in PARAMETERS:
            return self.made.config(target_modules=[], target_parameters=["target.stack"])
        return self.made.config(target_modules=["target"])

    def batch(self) -> Tensor:
        """Enough inputs to measure on."""
        return torch.cat([self.made.case.x() for _ in range(4)]).to(self.x.dtype)

    def adapted(self) -> PeftModel:
        """A model with a new adapter, measured on data if its initialisation needs it."""
        model, init = self.holder(), self.choice.init
        if init == "Corda":
            preprocess_corda(model, self.config(), lambda: model(self.batch()))
        elif init == "LoraGA":
            self._measure_gradients(model)
        result = get_peft_model(model, self.config()).eval()
        if init == "Eva":
            initialize_lora_eva_weights(
                result,
                [self.batch()],
                forward_fn=lambda model, batch: model(batch),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )
        return result

    def _measure_gradients(self, model: Holder) -> None:
        """Measure on the dense weights, since codes have no gradient."""
        dense, file = self.holder(dense=True), self.place / "gradients.pt"
        preprocess_loraga(dense, self.config(), lambda: dense(self.x).square().sum().backward(), file)
        preprocess_loraga(model, self.config(), pytest.fail, file)

    def perturbed(self, model: PeftModel) -> PeftModel:
        """The model, with values as training might leave them."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in dict.fromkeys(AdapterSet(model).parameters("default")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    def base(self, model: PeftModel) -> Holder:
        """A fresh base; with the weights that the initialisation gave it, where it says that it does."""
        fresh = self.holder()
        if self.made.start.replaces_base:
            fresh = self.holder(dense=True)
            values = dict(base_tensors(model))
            with torch.no_grad():
                for name, parameter in fresh.named_parameters():
                    parameter.copy_(values[name])
            fresh.target = self.made.store(fresh.target)
        return fresh.requires_grad_(False)


def run(model: PeftModel, x: Tensor) -> Tensor:
    """The output; past the face of the model, which asks an aLoRA where its text invokes it."""
    result: Tensor = model.get_base_model()(x)
    return result


def base_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The tensors of the base by their name there, as they are stored where that can be read."""
    result = {}
    for name, tensor in model.get_base_model().named_parameters():
        if "lora_" not in name:
            holder = model.get_base_model().get_submodule(name.rpartition(".")[0])
            if tensor.is_meta:
                tensor = find(holder, name.rpartition(".")[2]).read(holder, name.rpartition(".")[2])
            result[name.replace("base_layer.", "")] = tensor
    return result


def copies(tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Their values now, part by part."""
    return {name: [part.clone() for part in laws.parts_of(t)] for name, t in tensors.items()}


def assert_same(actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    assert actual.keys() == expected.keys()
    for name, parts in actual.items():
        assert len(parts) == len(expected[name])
        assert all(map(torch.equal, parts, expected[name])), f"{name} is not what it was"


# -- the laws ----------------------------------------------------------------------------------------


def is_refused_before_anything_changes(trial: Trial) -> None:
    model = trial.holder()
    before = Snapshot(model)
    with pytest.raises((TargetError, ConfigError)) as caught:
        get_peft_model(model, trial.config())
    assert trial.reason and trial.reason in str(caught.value), "another reason"
    before.assert_same(model)


def starts_as_its_init_promises(trial: Trial, model: PeftModel) -> None:
    init, expected = trial.made.start, trial.base(model)(trial.x)
    actual = run(model, trial.x)
    # Torch's attention is one kernel, an adapted one is several steps.
    own_step = trial.choice.layer in product.ATTENTION
    if not init.identity:
        assert not torch.equal(actual, expected), "the start is the base, against its promise"
    elif init.exact and trial.made.kind.additive and not own_step:
        assert torch.equal(actual, expected), "the start is not the base"
    else:
        laws.close(actual, expected, trial.made)


def only_its_parameters_learn_and_a_step_writes_nothing(trial: Trial, model: PeftModel) -> None:
    modules = [m for m in AdapterSet(model).modules() if "default" in m.held_adapters]
    own = {id(p) for m in modules for p in m.trained_parameters("default")}
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    before, places = copies(held), {n: (t._version, laws.address(t)) for n, t in held.items()}
    model.train()
    run(model, trial.x).float().square().sum().backward()
    run(model.eval(), trial.x)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), f"{name} may learn, or may not"
        assert (parameter.grad is not None) == (id(parameter) in own), f"{name} has a gradient, or has none"
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense()
            assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
            assert gradient.any(), f"the gradient of {name} is zero"
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {n: (t._version, laws.address(t)) for n, t in after.items()} == places, "a step wrote"
    kept = [n for n in before if not held[n].is_meta]
    assert_same({n: laws.parts_of(after[n]) for n in kept}, {n: before[n] for n in kept})
    model.zero_grad(set_to_none=True)


def disabled_is_the_base(trial: Trial, model: PeftModel) -> None:
    expected = trial.base(model)(trial.x)
    assert not torch.equal(run(model, trial.x), expected), "the adapter does nothing"
    with model.disable_adapter():
        assert torch.equal(run(model, trial.x), expected), "disabled is not the base"


def merging_is_right_or_refused(trial: Trial, model: PeftModel) -> None:
    expected, before = run(model, trial.x), copies(base_tensors(model))
    choice = trial.choice
    reason = product.refuses_merge(choice.layer, choice.variant, choice.storage)
    said = trial.made.unmergeable
    assert bool(reason) == bool(said) and said in (reason or ""), f"{reason!r} should say {said!r}"
    if reason is not None:
        with pytest.raises(MergeError) as caught:
            model.merge_adapter()
        assert reason in str(caught.value)
        assert not any(layer.merged for layer in model.base_model.layers().values())
    else:
        alone = trial.base(model)(trial.x)
        with laws.rounding_is_known():
            model.merge_adapter()
        laws.close_once_merged(run(model, trial.x), expected, trial.made)
        with model.disable_adapter():
            assert torch.equal(run(model, trial.x), alone), "merged and disabled is not the base"
        model.unmerge_adapter()
    assert_same(copies(base_tensors(model)), before)
    assert torch.equal(run(model, trial.x), expected), "the output is not what it was"


def saved_and_loaded_is_the_same(trial: Trial, model: PeftModel) -> None:
    replaced = trial.made.start.replaces_base
    with pytest.warns(VeneerWarning, match="save the base too") if replaced else nullcontext():
        model.save_pretrained(trial.place / "saved")
    # Trainable too: torch takes other kernels for weights that require a gradient.
    again = PeftModel.from_pretrained(trial.base(model), trial.place / "saved", is_trainable=True).eval()
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert_same(copies(theirs), copies(ours))
    held, read = ({n: t for n, t in m.named_parameters() if "lora_" in n} for m in (model, again))
    assert_same(copies(read), copies(held))
    assert torch.equal(run(again, trial.x), run(model, trial.x)), "loaded computes something else"


#: Those of a combination that is served, in the order of an adapter's life.
LAWS: tuple[Callable[[Trial, PeftModel], Any], ...] = (
    starts_as_its_init_promises,
    only_its_parameters_learn_and_a_step_writes_nothing,
    disabled_is_the_base,
    merging_is_right_or_refused,
    saved_and_loaded_is_the_same,
)


def holds(choice: Choice, place: Path) -> None:
    """Try one combination: it is refused with its reason, or every law holds."""
    trial = Trial(choice, place)
    if trial.reason is not None:
        is_refused_before_anything_changes(trial)
        return
    with acting_everywhere():  # a layer by itself has no text to be invoked in
        model = trial.adapted()
        for number, law in enumerate(LAWS):
            if number == 1:
                trial.perturbed(model)
            law(trial, model)
