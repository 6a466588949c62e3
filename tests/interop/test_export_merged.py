"""torch.export and torch.compile of merged models, and of adapted ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, get_peft_model

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Mixed(nn.Module):
    """An embedding, a convolution and a linear; (batch, length) -> (batch, length, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.conv(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        logits: Tensor = self.out(torch.tanh(x))
        return logits


class Logits(nn.Module):
    """A language model that returns one tensor, as exporters like it."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_bias=True,
            mlp_bias=True,
            use_cache=False,
        )
        self.lm = LlamaForCausalLM(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, vocabulary)."""
        logits: Tensor = self.lm(input_ids=input_ids).logits
        return logits


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "bias": "lora_only"},
}
TARGETS: dict[type[nn.Module], list[str]] = {
    Mixed: ["embed", "conv", "out"],
    Logits: ["embed_tokens", "q_proj", "down_proj"],
}


def adapted(kind: type[nn.Module], **options: Any) -> PeftModel:
    targets = [name for name in TARGETS[kind] if "embed" not in name or "lora_bias" not in options]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, **options)
    model = get_peft_model(kind().eval(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_merged_model_exports_as_if_it_had_never_had_an_adapter(
    kind: type[nn.Module], option: str, tmp_path: Path
) -> None:
    """Exported with any batch size, saved and loaded: the merged outputs, and the base's own graph."""
    model = adapted(kind, **OPTIONS[option])
    wanted = model(IDS)
    merged = model.merge_and_unload()
    rows = torch.export.Dim("rows", min=2, max=16)
    dynamic = {"input_ids": {0: rows}}
    program = torch.export.export(merged, (IDS,), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "merged.pt2")
    loaded = torch.export.load(tmp_path / "merged.pt2")
    with torch.no_grad():
        assert_close(loaded.module()(IDS), wanted)
        more = torch.randint(50, (5, 6))
        assert_close(loaded.module()(more), merged(more))
    assert not [name for name in loaded.state_dict if "lora" in name or "base_layer" in name]
    bare = torch.export.export(kind().eval(), (IDS,), dynamic_shapes=dynamic)
    steps = [[node.target for node in p.graph.nodes if node.op == "call_function"] for p in (loaded, bare)]
    assert list(map(str, steps[0])) == list(map(str, steps[1]))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapted_model_exports_in_the_state_that_it_is_in(kind: type[nn.Module], merged: bool) -> None:
    model = adapted(kind)
    wanted = model(IDS)
    if merged:
        model.merge_adapter()
    program = torch.export.export(model.get_base_model(), (IDS,))
    assert_close(program.module()(IDS), wanted)
    if merged:
        model.unmerge_adapter()
        assert torch.equal(model(IDS), wanted)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_merged_model_compiles_as_one_graph(option: str) -> None:
    model = adapted(Logits, **OPTIONS[option])
    wanted = model(IDS)
    merged = model.merge_and_unload()
    compiled = torch.compile(merged, backend="inductor", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(IDS), wanted)


def test_an_adapted_model_compiles_and_trains_alike() -> None:
    """Compiled by inductor with its adapter unmerged: the same outputs, and the same gradients."""
    model = adapted(Logits)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(IDS), twin(IDS))
    compiled(IDS).square().mean().backward()
    twin(IDS).square().mean().backward()
    compared = 0
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == ("lora_" not in name), name
        if ours.grad is not None:
            assert_close(ours.grad, theirs.grad)
            compared += 1
    assert compared == 10
