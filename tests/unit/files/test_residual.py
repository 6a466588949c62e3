"""The frozen term of an adapter: identity, other adapters, files, resumption."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.tolerances import assert_close
from veneer import (
    AdapterFileError,
    CheckpointError,
    CombineError,
    LoadMismatchError,
    LoraConfig,
    PeftModel,
    VeneerWarning,
    get_peft_model,
    get_peft_model_state_dict,
    preprocess_corda,
    set_peft_model_state_dict,
)


class Net(nn.Module):
    """Every geometry that has one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.linear = nn.Linear(12, 10)
        self.conv1d = Conv1D(9, 10)
        self.conv = nn.Conv1d(9, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv1d(torch.tanh(self.linear(self.embed(x)))))
        return self.conv(h.transpose(1, 2))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.arange(14).view(2, 7)
ALL = ["embed", "linear", "conv1d", "conv"]


def config(**options: Any) -> LoraConfig:
    given: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "target_modules": ALL, "init_lora_weights": "pissa", **options,
    }  # fmt: skip
    return LoraConfig(**given)


def steps(model: nn.Module, count: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return optimizer


PATTERNS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"linear": 3}, "alpha_pattern": {"conv": 5}},
    {"use_rslora": True, "rank_pattern": {"linear": 3}, "alpha_pattern": {"conv": 5}},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa_niter_4"},
    {"use_dora": True, "target_modules": ["linear", "conv1d"]},
]


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_training_goes_on_bit_for_bit_after_a_reload(tmp_path: Path, options: dict[str, Any]) -> None:
    model = get_peft_model(net(), config(**options))
    optimizer = steps(model, 3)
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    other = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    other.load_state_dict(saved)
    steps(model, 3, optimizer)
    steps(again, 3, other)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    mine, its = model.peft_config["default"], again.peft_config["default"]
    assert (mine.r, mine.lora_alpha, mine.rank_pattern) == (its.r, its.lora_alpha, its.rank_pattern)
    assert mine.init_lora_weights == its.init_lora_weights


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_the_file_is_a_plain_adapter_of_twice_the_rank(tmp_path: Path, options: dict[str, Any]) -> None:
    model = get_peft_model(net(), config(**options))
    steps(model, 3)
    model.save_pretrained(tmp_path)
    expected = model.eval()(X).detach()
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file)  # without metadata, as a reader that knows nothing of the mark sees it
    plain = PeftModel.from_pretrained(net(), tmp_path)
    assert plain.peft_config["default"].init_lora_weights is True
    assert_close(plain(X), expected)
    names = {name.rpartition(".lora_")[2] for name in tensors}
    assert names <= {
        "A.weight", "B.weight", "embedding_A", "embedding_B", "magnitude_vector",
    }  # fmt: skip


def test_the_adapter_is_an_identity_and_the_base_is_kept() -> None:
    base = net()
    for dtype in (torch.float32, torch.bfloat16):
        own = copy.deepcopy(base).to(dtype)
        model = get_peft_model(copy.deepcopy(own), config())
        assert torch.equal(model(X), own(X))
        assert torch.equal(model.get_base_model().linear.base_layer.weight, own.linear.weight)


def test_names_and_counts_are_those_of_a_plain_adapter() -> None:
    model, plain = get_peft_model(net(), config()), get_peft_model(net(), config(init_lora_weights=True))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert len(extra) == 8 and all(".lora_residual_" in name for name in extra)


def test_beside_another_adapter_each_computes_what_it_does_alone() -> None:
    alone = get_peft_model(net(), config(init_lora_weights=False))
    x = alone(X).detach()
    both = get_peft_model(net(), config())
    both.add_adapter("other", config(init_lora_weights=False))
    state = get_peft_model_state_dict(alone)
    set_peft_model_state_dict(both, state, "other")
    both.set_adapter("other")
    assert torch.equal(both(X), x)
    steps(both, 1)
    both.set_adapter("default")
    assert torch.equal(both(X), net()(X))


def test_rename_copy_delete_disable_merge_and_combine() -> None:
    base = net()
    model = get_peft_model(copy.deepcopy(base), config())
    steps(model, 3)
    expected = model(X).detach()
    assert not torch.allclose(expected, base(X))
    model.base_model.rename_adapter("default", "mine")
    assert torch.equal(model(X), expected)
    model.base_model.copy_adapter("mine", "twin")
    model.set_adapter("twin")
    assert torch.equal(model(X), expected)
    steps(model, 1)
    model.set_adapter("mine")
    assert torch.equal(model(X), expected), "a copy shares memory"
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    model.merge_adapter()
    assert_close(model(X), expected)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    for method, rank in (("cat", 8), ("svd", 8)):
        report = model.add_weighted_adapter(["mine"], [1.0], method, combination_type=method)
        assert set(report.ranks.values()) == {rank}
        model.set_adapter(method)
        assert_close(model(X), expected)
        assert not any(layer.residual(method) for layer in model.base_model.layers().values())
    with pytest.raises(CombineError, match="ties_svd"):
        model.add_weighted_adapter(["mine", "twin"], [1.0, 1.0], "t", combination_type="ties", density=0.5)
    model.set_adapter("mine")
    model.delete_adapter("twin")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    assert_close(model.merge_and_unload()(X), expected)
    twin.delete_adapter("cat")
    twin.delete_adapter("svd")
    with pytest.warns(VeneerWarning, match="no adapter is active"):
        twin.delete_adapter("mine")
    assert not any("lora_residual" in name for name in twin.state_dict())


def test_state_dicts_go_round() -> None:
    model = get_peft_model(net(), config())
    steps(model, 2)
    state = get_peft_model_state_dict(model)
    assert state["base_model.model.linear.lora_A.weight"].shape == (8, 12)
    for low_cpu_mem_usage in (False, True):
        fresh = get_peft_model(net(), config(), low_cpu_mem_usage=low_cpu_mem_usage)
        result = set_peft_model_state_dict(fresh, state)
        assert not result.missing_keys and not result.unexpected_keys
        for name, tensor in model.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], tensor), name
    parameters = dict(model.named_parameters())  # what some gather from shards
    again = get_peft_model_state_dict(model, state_dict=parameters)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_loading_into_the_adapter_that_is_there_as_trainers_do(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    steps(model, 2)
    model.save_pretrained(tmp_path)
    expected = copy.deepcopy(model.state_dict())
    steps(model, 2)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in expected.items())
    fresh = get_peft_model(net(), config(init_lora_weights="olora"))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(fresh.state_dict()[n], t) for n, t in expected.items())


def test_a_bin_is_marked_as_well(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    steps(model, 2)
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.warns(VeneerWarning, match="is a pickle"):
        loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())


def test_an_edited_strength_is_used(tmp_path: Path) -> None:
    model = get_peft_model(net(), config(target_modules=["conv"]))
    steps(model, 2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "lora_alpha": 3 * values["lora_alpha"]}))
    with pytest.warns(VeneerWarning, match="lora_alpha"):
        loaded = PeftModel.from_pretrained(net(), tmp_path)
    base = net()(X)
    assert_close(loaded(X) - base, 3 * (model(X) - base))


def test_conversion_is_not_needed(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    with pytest.warns(VeneerWarning, match="not needed"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="start")
    plain = get_peft_model(net(), config(init_lora_weights=True))
    with pytest.raises(CheckpointError, match="no start that was subtracted"):
        plain.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="start")


def test_a_damaged_mark_is_said(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    good = json.loads(metadata["veneer_residual"])
    for text in (
        "{",
        "[]",
        "[" * 100_000,
        json.dumps({**good, "r": -1}),
        json.dumps({**good, "rank_pattern": 3}),
    ):
        save_file(tensors, file, {**metadata, "veneer_residual": text})
        with pytest.raises(AdapterFileError, match="mark of its frozen term is damaged"):
            PeftModel.from_pretrained(net(), tmp_path)


def raw(model: PeftModel, place: Path, init: str) -> None:
    """A directory as the reference writes it: the trained factors alone."""
    model.save_pretrained(place)
    tensors = load_file(place / "adapter_model.safetensors")
    r = {name: t.shape[0 if "_A" in name else 1] // 2 for name, t in tensors.items()}
    halves = {n: (t[: r[n]] if "_A" in n else t[:, : r[n]]).contiguous() for n, t in tensors.items()}
    save_file(halves, place / "adapter_model.safetensors")
    content = json.loads((place / "adapter_config.json").read_text())
    content.update(r=4, lora_alpha=6, init_lora_weights=init)
    (place / "adapter_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_raw_factors_get_their_start_from_the_base_and_that_is_said(tmp_path: Path, init: str) -> None:
    model = get_peft_model(net(), config(init_lora_weights=init))
    steps(model, 2)
    raw(model, tmp_path, init)
    with pytest.warns(VeneerWarning, match="must be the original base"):
        again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(X), model.eval()(X))


def test_raw_factors_of_measured_starts_are_refused_with_the_way_out(tmp_path: Path) -> None:
    base = net()
    given = config(init_lora_weights="corda", target_modules=["linear", "conv1d"])
    preprocess_corda(base, given, lambda: base(X))
    model = get_peft_model(base, given)
    raw(model, tmp_path, "corda")
    with pytest.raises(LoadMismatchError, match="path_initial_model_for_weight_conversion"):
        PeftModel.from_pretrained(net(), tmp_path)
