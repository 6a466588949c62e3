"""Wherever memory runs out while an adapter is put in, the model is as it was."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.laws.snapshots import Snapshot
from tests.laws.special_models import Attending, Mixture, Tied
from veneer import EvaConfig, LoftQConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from veneer.layers import LoraLayer, wrap


class OutOfMemory(TorchDispatchMode):
    """Every operation that gives a new tensor fails from the ``at``-th on; None only counts."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not func._schema.is_mutable:
            if self.count == self.at:
                raise torch.OutOfMemoryError(f"no memory for operation {self.at}: {func}")
            self.count += 1
        return func(*args, **(kwargs or {}))


class Small(nn.Module):
    """An embedding, two linears in 16 bits with biases, and a head that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8, dtype=torch.bfloat16)
        self.down = nn.Linear(8, 6, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (n,) -> (n, 11)."""
        x = self.down(self.up(self.embed(ids).bfloat16()).relu()).float()
        return self.head(self.norm(x))


class Replicated(nn.Module):
    """A list of layers, as decoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, 4) -> (n, 4)."""
        for layer in self.layers:
            x = layer(x).tanh()
        return x


TWO = {"target_modules": ["up", "down"]}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (Small, {**TWO, "lora_dropout": 0.1}),
    "dora": (Small, {**TWO, "use_dora": True}),
    "biases": (Small, {**TWO, "bias": "all", "lora_bias": True}),
    "pissa": (Small, {**TWO, "init_lora_weights": "pissa"}),
    "eva": (Small, {**TWO, "init_lora_weights": "eva", "eva_config": EvaConfig()}),
    "loftq": (Small, {**TWO, "init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_iter=1)}),
    "embedding": (Small, {"target_modules": ["embed", "up"]}),
    "tied": (Small, {"target_modules": ["embed", "up"], "ensure_weight_tying": True}),
    "modules_to_save": (Small, {"target_modules": ["up"], "modules_to_save": ["norm"]}),
    "tied copies": (
        Small,
        {"target_modules": ["up"], "modules_to_save": ["embed"], "ensure_weight_tying": True},
    ),
    "tokens": (Tied, {"target_modules": ["body"], "trainable_token_indices": {"embed": [1, 4]}}),
    "attention": (Attending, {"target_modules": ["attn", "head"]}),
    "parameters": (
        Mixture,
        {"target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]},
    ),
    "replicated": (Replicated, {"target_modules": "all-linear", "layer_replication": [[0, 2], [0, 2]]}),
}
NEW = ["get_peft_model", "inject_adapter_in_model", "from_pretrained"]
BESIDE = ["add_adapter", "copy_adapter", "load_adapter"]
DOORS = [*NEW, *BESIDE, "load_adapter again", "load_adapter into meta"]
#: Two adapters cannot train the same biases or rows.
ALONE = {"biases": {"bias": "none"}, "tokens": {"trainable_token_indices": {"embed": [2]}}}


def config(options: Mapping[str, Any], **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, **options, **more})


def made(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().train()


def saved(case: str, directory: Path, embeddings: bool) -> Path:
    """An adapter of the case, trained a little, perhaps with other embeddings beside it."""
    model = get_peft_model(made(case), config(CASES[case][1], **ALONE.get(case, {})))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.125
        if embeddings:
            model.get_input_embeddings().weight += 0.125
    model.save_pretrained(directory, save_embedding_layers=embeddings)
    return directory


def call(case: str, door: str, directory: Path) -> tuple[nn.Module, Callable[[], Any]]:
    """A model, and what puts an adapter into it."""
    options, model = CASES[case][1], made(case)
    if door == "get_peft_model":
        return model, lambda: get_peft_model(model, config(options))
    if door == "inject_adapter_in_model":
        return model, lambda: inject_adapter_in_model(config(options), model)
    own = saved(case, directory, embeddings=case == "plain")
    if door == "from_pretrained":
        return model, lambda: PeftModel.from_pretrained(model, own)
    face = get_peft_model(model, config(options), "first")
    if door == "add_adapter":
        return face, lambda: face.add_adapter("second", config(options, **ALONE.get(case, {})))
    if door == "copy_adapter":
        return face, lambda: face.copy_adapter("first", "second")
    if door == "load_adapter":
        return face, lambda: face.load_adapter(own, "second", is_trainable=True)
    if case in ALONE:
        face.save_pretrained(own)
        own = own / "first"
    if door == "load_adapter into meta":
        face = get_peft_model(made(case), config(options), "first", low_cpu_mem_usage=True)
    return face, lambda: face.load_adapter(own, "first", is_trainable=True)


def times_out_of_memory(call: Callable[[], Any], check: Callable[[], None]) -> int:
    """Let memory run out at the first operation, then at the second, until the call succeeds."""
    at = 0
    while True:
        try:
            with OutOfMemory(at):
                call()
        except torch.OutOfMemoryError:
            check()
            at += 1
        else:
            return at


@pytest.mark.parametrize(
    ("case", "door"), [pair for pair in itertools.product(CASES, DOORS) if pair != ("biases", "copy_adapter")]
)
def test_memory_that_runs_out_anywhere_leaves_the_model_as_it_was(
    case: str, door: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, put_in = call(case, door, tmp_path)
        before, names = Snapshot(model), list(getattr(model, "peft_config", {}))
        held = [(m.held_adapters, m.active_adapters) for m in model.modules() if isinstance(m, LoraLayer)]

        def unchanged() -> None:
            before.assert_same(model)
            assert list(getattr(model, "peft_config", {})) == names
            now = [(m.held_adapters, m.active_adapters) for m in model.modules() if isinstance(m, LoraLayer)]
            assert now == held

        assert times_out_of_memory(put_in, unchanged) > 3


def test_memory_that_runs_out_while_a_module_is_wrapped_leaves_it_as_it_was() -> None:
    alone = nn.Linear(6, 8, dtype=torch.bfloat16)
    before = Snapshot(alone)
    layers: list[nn.Module] = []
    start = lambda: layers.append(wrap(alone, config({"use_dora": True})))  # noqa: E731
    assert times_out_of_memory(start, lambda: before.assert_same(alone)) > 3
    layer = layers[0]
    before = Snapshot(layer)
    again = lambda: wrap(layer, config({}), "second")  # noqa: E731
    assert times_out_of_memory(again, lambda: before.assert_same(layer)) > 3


def test_memory_that_runs_out_while_adapters_are_combined_leaves_the_model_as_it_was() -> None:
    model = get_peft_model(made("embedding"), config(CASES["embedding"][1]), "a")
    model.add_adapter("b", config(CASES["embedding"][1]))
    before = Snapshot(model)

    def unchanged() -> None:
        before.assert_same(model)
        assert list(model.peft_config) == ["a", "b"]

    combine = lambda: model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "c", "cat")  # noqa: E731
    assert times_out_of_memory(combine, unchanged) > 3
    assert list(model.peft_config) == ["a", "b", "c"]
