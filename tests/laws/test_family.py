"""Adapters of a family: each is trained as if it were alone, and nothing of one reaches another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tests.tolerances import FAMILY, assert_close
from veneer import Family, LoraConfig, get_peft_model

Batches = dict[str, dict[str, Tensor]]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def qwen2_moe() -> nn.Module:
    """With shared experts, which get rows and tokens in one axis."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=24, decoder_sparse_step=1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config)


def llama4() -> nn.Module:
    """With experts that get all tokens, one copy after the other."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_local_experts=4,
        num_experts_per_tok=2, intermediate_size_mlp=24, interleave_moe_layer_step=1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Llama4ForCausalLM(config)


class Special(nn.Module):
    """Layers of every kind, over an image and a text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2)
        self.embed = nn.Embedding(20, 24)
        self.attn = nn.MultiheadAttention(24, 2, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 7)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        """image: (n, 2, 4, 4), ids: (n, length) -> (n, length + 1, 7)."""
        seen = self.grouped(self.conv(image).relu()).flatten(1).unsqueeze(1)
        x = torch.cat([seen, self.embed(ids)], 1)
        return self.head(self.norm(self.attn(x, x, x, need_weights=False)[0]))  # type: ignore[no-any-return]


EVERYWHERE = "all-linear"
#: Adapters that differ in every way in which those of one family may.
OF_LLAMA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": EVERYWHERE, "r": 4},
    "few": {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_rslora": True, "lora_alpha": 5},
    "dropped": {"target_modules": EVERYWHERE, "r": 4, "lora_dropout": 0.2},
    "biased": {"target_modules": ["v_proj", "up_proj"], "r": 2, "lora_bias": True, "lora_dropout": 0.1},
    "pissa": {"target_modules": ["q_proj", "o_proj"], "r": 2, "init_lora_weights": "pissa"},
    "dora": {"target_modules": ["k_proj", "gate_proj"], "r": 2, "use_dora": True, "lora_dropout": 0.1},
    "saved": {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head", "model.norm"]},
    "tokens": {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": {"embed_tokens": [3, 5]}},
}
OF_SPECIAL: dict[str, dict[str, Any]] = {
    "convolutions": {"target_modules": ["conv", "grouped"], "r": 2},
    "attention": {"target_modules": ["attn", "head"], "r": 2, "lora_dropout": 0.2},
    "lookup": {"target_modules": ["embed"], "r": 3, "modules_to_save": ["norm"]},
    "dora": {"target_modules": ["conv", "head"], "r": 2, "use_dora": True},
}
OF_MIXTRAL: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"], "r": 2},
    "larger": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": [], "r": 3},
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_dropout": 0.1},
}
OF_QWEN2_MOE: dict[str, dict[str, Any]] = {
    "shared": {"target_modules": r".*\.(q_proj|shared_expert.*)", "r": 2, "lora_dropout": 0.2},
    "experts": {
        "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
        "target_modules": [],
        "r": 3,
    },
    "dora": {"target_modules": r".*\.shared_expert\.\w+", "r": 2, "use_dora": True, "lora_dropout": 0.1},
}
OF_LLAMA4: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"], "r": 2},
    "router": {
        "target_parameters": ["router.weight", "gate_up_proj", "down_proj"],
        "target_modules": [],
        "r": 3,
    },
    "shared": {"target_modules": r".*\.shared_expert\.\w+", "r": 2, "lora_dropout": 0.2},
}
KINDS = {
    "llama": (llama, OF_LLAMA),
    "special": (Special, OF_SPECIAL),
    "mixtral": (mixtral, OF_MIXTRAL),
    "qwen2-moe": (qwen2_moe, OF_QWEN2_MOE),
    "llama4": (llama4, OF_LLAMA4),
}


def texts(names: Mapping[str, Any]) -> Batches:
    """A batch for each name, of different sizes and lengths."""
    found: Batches = {}
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, 64, (1 + i % 3, 5 + 2 * (i % 4)), generator=generator)
        labels = ids.clone()
        labels[:, :2] = -100
        found[name] = {"input_ids": ids, "labels": labels}
    return found


def pictures(names: Mapping[str, Any]) -> Batches:
    found: Batches = {}
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        found[name] = {
            "image": torch.randn(1 + i, 2, 4, 4, generator=generator),
            "ids": torch.randint(0, 20, (1 + i, 5), generator=generator),
            "target": torch.randint(0, 7, (1 + i,), generator=generator),
        }
    return found


def of_pictures(output: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    last = output[:, -1]
    return nn.functional.cross_entropy(last, batch["target"], reduction="sum"), len(last)


def family(kind: str, names: list[str], exact: bool = False) -> Family:
    """The adapters of these names, with factors that are not zero."""
    base, of = KINDS[kind]
    made = Family(base(), exact=exact)
    for name in names:
        seed = list(of).index(name)
        made.add(name, LoraConfig(**of[name]), learning_rate=1e-2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


def step(made: Family, batches: Batches) -> dict[str, Any]:
    loss: Any = "cross_entropy" if "labels" in next(iter(batches.values())) else of_pictures
    return made.forward_backward(batches, loss)


def gradients(made: Family, name: str) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in made.parameters(name)]


def everything(kind: str) -> tuple[list[str], Batches]:
    of = KINDS[kind][1]
    return list(of), pictures(of) if kind == "special" else texts(of)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_is_trained_as_if_it_were_alone(kind: str, exact: bool) -> None:
    names, batches = everything(kind)
    together = family(kind, names, exact)
    results = step(together, batches)
    for name in names:
        alone = family(kind, [name], exact)
        result = step(alone, {name: batches[name]})[name]
        mine, theirs = gradients(together, name), gradients(alone, name)
        if exact:
            assert result.loss == results[name].loss
            assert all(map(torch.equal, mine, theirs)), name
        assert_close(torch.tensor(results[name].loss), torch.tensor(result.loss), FAMILY)
        whole = torch.cat([t.flatten() for t in theirs])
        assert whole.norm() > 0, name
        assert (torch.cat([t.flatten() for t in mine]) - whole).norm() <= 1e-5 * whole.norm(), name


def test_losses_stay_those_of_the_adapter_alone() -> None:
    """At a rate at which the training is no chaos, in which every rounding grows."""
    names = ["dropped", "dora"]
    batches = {name: texts(OF_LLAMA)[name] for name in names}
    together = family("llama", names)
    apart = {name: family("llama", [name]) for name in names}
    for _ in range(60):
        results = step(together, batches)
        together.optim_step(learning_rate=3e-3)
        for name, one in apart.items():
            alone = step(one, {name: batches[name]})[name]
            one.optim_step(learning_rate=3e-3)
            assert abs(results[name].loss - alone.loss) <= 1e-4 * max(alone.loss, 1.0), name


def test_a_family_of_one_takes_the_ordinary_step() -> None:
    config = LoraConfig(target_modules=EVERYWHERE, r=4, lora_dropout=0.1)
    one = Family(llama())
    one.add("default", config, learning_rate=1e-2, seed=3)
    base = llama()
    torch.manual_seed(3)
    model = get_peft_model(base, config).train()
    ordinary = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, fused=True
    )
    batch = texts({"default": None})["default"]
    torch.manual_seed(3)
    for _ in range(3):
        result = step(one, {"default": batch})["default"]
        loss = model(**batch).loss
        loss.backward()
        assert_close(torch.tensor(result.loss), loss.detach(), FAMILY)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        one.optim_step()
        ordinary.step()
        ordinary.zero_grad()
    theirs = [p for p in model.parameters() if p.requires_grad]
    for mine, their in zip(one.parameters("default"), theirs, strict=True):
        assert_close(mine.detach(), their.detach(), FAMILY)


def spoil(made: Family, name: str, what: str, batches: Batches) -> Batches:
    if what == "factors":
        with torch.no_grad():
            for parameter in made.parameters(name):
                parameter.fill_(torch.nan)
    elif what == "optimizer":
        for state in made.optimizer(name).state.values():
            state["exp_avg"].fill_(torch.nan)
    elif what == "data":
        changed = dict(batches[name])
        for key in {"image", "input_ids", "ids"} & set(changed):
            whole = changed[key]
            changed[key] = whole.flip(-1) if key.endswith("ids") else torch.full_like(whole, torch.nan)
        return {**batches, name: changed}
    return batches


def observed(made: Family, names: list[str], batches: Batches) -> Iterator[tuple[str, Tensor]]:
    """All that a step of the others leaves: losses, gradients, norms, optimizers, random numbers."""
    results = step(made, batches)
    for name in names:
        yield f"{name}: loss", torch.tensor(results[name].loss)
        for i, gradient in enumerate(gradients(made, name)):
            yield f"{name}: gradient {i}", gradient.clone()
    for name, taken in made.optim_step(names).items():
        yield f"{name}: norm", torch.tensor(taken.grad_norm)
        for i, parameter in enumerate(made.parameters(name)):
            yield f"{name}: parameter {i}", parameter.detach().clone()
        for i, state in enumerate(made.optimizer(name).state.values()):
            yield f"{name}: state {i}", torch.stack([t.flatten().sum() for t in state.values()])
        yield f"{name}: random numbers", made.generator(name).get_state()


@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("what", ["factors", "optimizer", "data"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_another_adapter_changes(kind: str, what: str) -> None:
    names, batches = everything(kind)
    for spoilt in names:
        others = [name for name in names if name != spoilt]
        expected, found = family(kind, names), family(kind, names)
        for made in (expected, found):
            step(made, batches)
            made.optim_step()
        changed = spoil(found, spoilt, what, batches)
        right = dict(observed(expected, others, batches))
        for name, tensor in observed(found, others, changed):
            assert torch.equal(tensor, right[name]), f"{spoilt} -> {name}"


def counted_products(
    made: Family, batches: Batches, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> tuple[int, int]:
    """How often a step multiplies with a base's weight, forwards, and the bytes kept for the backward."""
    calls = []
    original = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, nn.Parameter) and weight.shape[0] > 8 and weight.shape[1] > 8:
            calls.append(weight.shape)
        return original(x, weight, bias)

    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and tensor.dim():  # each adapter has a loss: some scalars
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        step(made, batches)
    monkeypatch.undo()
    return len(calls), sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_base_is_multiplied_once(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    """For any number of adapters, and no more is kept than for one adapter with the same tokens."""
    made = Family(llama())
    for name in "abcd":
        made.add(name, LoraConfig(target_modules=EVERYWHERE, r=4))
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    apart = {name: {"input_ids": ids[i : i + 1], "labels": ids[i : i + 1]} for i, name in enumerate("abcd")}
    whole = {"a": {"input_ids": ids, "labels": ids}}
    calls, kept = counted_products(made, apart, monkeypatch, autocast)
    one_calls, one_kept = counted_products(made, whole, monkeypatch, autocast)
    assert calls == one_calls == 2 * 7 + 1
    assert kept <= one_kept
