"""Plan -> wrapped model: what is refused and why, what stays untouched, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import (
    LoraConfig,
    TargetError,
    VeneerError,
    VeneerWarning,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from veneer.inject.api import eject
from veneer.inject.sites import sites
from veneer.layers import LoraLayer


def config(*targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": list(targets), **more})


class Tower(nn.Module):
    """A linear that two places share, a hook, and a part in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.frozen = nn.Linear(4, 4).eval()
        self.list = nn.ModuleList([self.first, nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """Every path, one after the other."""
        return self.list[1](self.list[0](self.frozen(self.again(self.first(x)))))


# -- what is refused ---


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ConvTranspose1d(2, 2, 3), "transposed convolution"),
        (nn.ConvTranspose2d(2, 2, 3), "transposed convolution"),
        (nn.ConvTranspose3d(2, 2, 3), "transposed convolution"),
        (nn.Bilinear(2, 2, 2), "over two inputs"),
        (nn.LSTM(2, 2), "fused recurrent kernel"),
        (nn.GRU(2, 2), "fused recurrent kernel"),
        (nn.RNN(2, 2), "fused recurrent kernel"),
        (nn.LSTMCell(2, 2), "fused recurrent kernel"),
        (nn.GRUCell(2, 2), "fused recurrent kernel"),
        (nn.EmbeddingBag(4, 2), "EmbeddingBag|nn.Embedding"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_types_that_are_not_adapted_are_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    class Subclass(type(module)):  # type: ignore[misc]
        pass

    module.__class__ = Subclass
    model = nn.Sequential(nn.Linear(2, 2), module)
    with pytest.raises(TargetError, match=reason):
        get_peft_model(model, config("0", "1"))
    assert type(model[0]) is nn.Linear


def test_children_of_multihead_attention_are_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match="without calling it"):
        get_peft_model(model, config("out_proj", "linear"))
    with pytest.warns(VeneerWarning, match="out_proj"):
        adapted = get_peft_model(model, config(target_modules="all-linear"))
    assert [p for p, m in adapted.named_modules() if isinstance(m, LoraLayer)] == ["base_model.model.linear"]


def test_all_reasons_come_at_once() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(6, 6, 3, groups=3), nn.Linear(4, 4))
    with pytest.raises(TargetError) as caught:
        get_peft_model(model, config("0", "1", "2", r=5))
    assert "2 groups" in str(caught.value) and "3 groups" in str(caught.value)


def test_adapters_of_the_reference_library_are_not_wrapped_again() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    )
    for given in (model, model.base_model.model):
        with pytest.raises((TargetError, VeneerError), match=r"peft|PeftModel"):
            get_peft_model(given, config("0"))


# -- what stays untouched ---


def test_the_same_object_with_everything_else_untouched() -> None:
    model = Tower()
    calls: list[str] = []
    model.frozen.register_forward_hook(lambda *_: calls.append("frozen"))
    model.list[1].register_forward_hook(lambda *_: calls.append("last"))
    untouched, hooked = model.frozen, model.list[1]
    result = inject_adapter_in_model(config("list.1"), model)
    assert result is model and model.frozen is untouched and not untouched.training
    assert model.list[1].base_layer is hooked and model.list[1].training
    model(torch.ones(2, 4))
    assert calls == ["frozen", "last"]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_new_adapters_dropout_acts_and_the_base_keeps_its_mode(training: bool, inference: bool) -> None:
    model = Tower().train(training)
    inject_adapter_in_model(config("frozen", lora_dropout=0.5, inference_mode=inference), model)
    acts = training or not inference
    assert model.frozen.lora_dropout["default"].training is acts and model.frozen.training is acts
    assert model.frozen.base_layer.training is model.training is training
    assert all(p.requires_grad is not inference for p in model.frozen.adapter_parameters("default"))


@pytest.mark.parametrize("training", [False, True])
def test_loading_for_inference_takes_all_adapters_into_evaluation(training: bool, tmp_path: Path) -> None:
    made = get_peft_model(Tower(), config("frozen", lora_dropout=0.5))
    made.save_pretrained(tmp_path)
    model = get_peft_model(Tower().train(training), config("frozen", lora_dropout=0.5))
    model.copy_adapter("default", "twin")
    assert model.get_base_model().frozen.lora_dropout["twin"].training
    model.load_adapter(tmp_path, "other", check_base=False)
    assert not any(module.training for module in model.modules())
    model.add_adapter("late", config("frozen", lora_dropout=0.5))
    model.load_adapter(tmp_path, "last", check_base=False)
    assert not any(module.training for module in model.modules())


def test_a_module_in_several_places_is_adapted_once_in_all_of_them() -> None:
    model = Tower()
    original = model.first
    inject_adapter_in_model(config("first"), model)
    assert isinstance(model.first, LoraLayer)
    assert model.first is model.again is model.list[0]
    assert sum(isinstance(m, LoraLayer) for m in model.modules()) == 1
    train(model, "default")
    x = torch.randn(2, 4)
    expected = model(x)
    model.first.merge()
    assert_close(model(x), expected)
    model.first.unmerge()
    whole = get_peft_model(Tower(), config("first"))
    train(whole, "default")
    expected = whole(x)
    assert_close(whole.merge_and_unload()(x), expected)
    eject(model)
    assert model.first is model.again is model.list[0] is original


def test_sites_name_every_module_once() -> None:
    found = sites(Tower())
    assert list(found) == ["first", "frozen", "list", "list.1"]
    assert len(found["first"].parents) == 3


def test_a_model_that_is_one_layer_has_nothing_to_replace() -> None:
    with pytest.raises(TargetError):
        get_peft_model(nn.Linear(3, 3), config("linear"))


def test_targets_from_the_keys_of_a_state_dict() -> None:
    source = Tower()
    inject_adapter_in_model(config("frozen", "list.1", rank_pattern={"frozen": 3}), source)
    keys = {k: v for k, v in source.state_dict().items() if ".lora_" in k}
    on_disk = {f"base_model.model.{k.replace('.default', '')}": v for k, v in keys.items()}
    model = inject_adapter_in_model(config("first"), Tower(), state_dict=on_disk)
    assert {p: m.r["default"] for p, m in model.named_modules() if isinstance(m, LoraLayer)} == {
        "frozen": 3,
        "list.1": 2,
    }
    with pytest.raises(TargetError, match="no lora_A"):
        inject_adapter_in_model(config("first"), Tower(), state_dict={"weight": torch.ones(1)})


def test_low_cpu_mem_usage_gives_factors_without_values() -> None:
    model = inject_adapter_in_model(config("frozen"), Tower(), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in model.frozen.adapter_parameters("default"))
    assert not model.frozen.base_layer.weight.is_meta


# -- torch's fused transformer encoder ---

nested_is_a_prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@nested_is_a_prototype
@pytest.mark.parametrize("target", [["linear1"], ["linear2"], ["linear1", "linear2"]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_torchs_fused_encoder_does_not_bypass_adapters(target: list[str], masked: bool, nested: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]]) if masked else None
    with torch.no_grad():
        plain = encoder(x, src_key_padding_mask=mask)
    model = get_peft_model(encoder, config(*target)).eval()
    train(model, "default")
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    slow = model(x.requires_grad_(), src_key_padding_mask=mask).detach()
    kept = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    assert_close(fast[kept], slow[kept])
    assert not torch.allclose(fast[:, 0], plain[:, 0])


@nested_is_a_prototype
def test_unload_gives_the_fused_encoder_back() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    before = (encoder.use_nested_tensor, [len(m._forward_hooks) for m in encoder.modules()])
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False, False, False, True, True]])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=mask)
        base = get_peft_model(encoder, config("linear1")).base_model.unload()
        assert torch.equal(base(x, src_key_padding_mask=mask), expected)
    assert (base.use_nested_tensor, [len(m._forward_hooks) for m in base.modules()]) == before


# -- randomness ---


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return {
        path: layer.factors(adapter)[0].detach().clone()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.held_adapters
    }


def test_a_seed_repeats_the_start_and_two_adapters_differ() -> None:
    def made(seed: int) -> dict[str, Tensor]:
        model = Tower()
        torch.manual_seed(seed)
        return factors(inject_adapter_in_model(config("first", "list.1"), model))

    assert all(torch.equal(a, b) for a, b in zip(made(1).values(), made(1).values(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(made(1).values(), made(2).values(), strict=True))
    first, last = made(1).values()
    assert not torch.equal(first, last)
    model = get_peft_model(Tower(), config("first"))
    model.add_adapter("second", config("first"))
    assert not torch.equal(*factors(model).values(), *factors(model, "second").values())


def test_the_start_does_not_depend_on_the_order_of_modules_or_on_what_else_is_adapted() -> None:
    def made(*names: str, targets: tuple[str, ...]) -> dict[str, Tensor]:
        model = nn.Module()
        for name in names:
            setattr(model, name, nn.Linear(5, 5))
        torch.manual_seed(3)
        return factors(inject_adapter_in_model(config(*targets), model))

    one = made("a", "b", "c", targets=("a", "b", "c"))
    two = made("c", "x", "b", "a", targets=("b", "c"))
    assert torch.equal(one["b"], two["b"]) and torch.equal(one["c"], two["c"])


def test_one_draw_of_the_global_generator_for_an_adapter() -> None:
    torch.manual_seed(5)
    torch.randint(2**62, (1,), dtype=torch.int64)
    expected = torch.rand(1)
    model = Tower()
    torch.manual_seed(5)
    inject_adapter_in_model(config("first", "frozen", "list.1"), model)
    assert torch.equal(torch.rand(1), expected)


class Tied(nn.Module):
    """An embedding, a linear, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.q_proj = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.q_proj(self.embed_tokens(x)))
        return y


TIED = {"ensure_weight_tying": True}
USES: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "tied": {"target_modules": ["embed_tokens"], **TIED},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], **TIED},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1]},
}


def test_a_block_is_trained_whole_without_what_a_deleted_adapter_left_in_it() -> None:
    def blocks() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))})

    whole = LoraConfig(target_modules=["a"], modules_to_save=["b"])
    reference = get_peft_model(blocks(), whole)
    model = get_peft_model(blocks(), LoraConfig(target_modules=["a", "b.0"]))
    with pytest.warns(UserWarning, match="no adapter is active"):
        model.delete_adapter("default")
    model.add_adapter("default", whole)
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(reference).keys()


@pytest.mark.parametrize("first", USES)
@pytest.mark.parametrize("second", USES)
def test_what_a_deleted_adapter_left_behind_binds_no_later_one(first: str, second: str) -> None:
    x = torch.tensor([[1, 2]])
    reference = get_peft_model(Tied(), LoraConfig(**USES[second]))
    model = get_peft_model(Tied(), LoraConfig(**USES[first]))
    with pytest.warns(UserWarning, match="no adapter is active"):
        model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(**USES[second]))
    model.set_adapter("default")
    train(model, x)
    expected, found = ([p.shape for p in m.parameters() if p.requires_grad] for m in (reference, model))
    assert sorted(found) == sorted(expected)
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(reference).keys()
    tied = [m for m in model.modules() if getattr(m, "held_adapters", ()) and m.tied_adapter is not None]
    assert bool(tied) is (second in ("tied", "saved tied", "tokens"))
