"""The laws of a whole model: files, failures that change nothing, sweeps by a quantiser."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.laws.cases import EACH_CASE, INITS, Combination, SamePadConv2d, train
from tests.laws.snapshots import Snapshot
from veneer import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from veneer.errors import (
    AdapterFileError,
    AdapterNameError,
    ConfigError,
    LoadMismatchError,
    MergeError,
    TargetError,
    VeneerError,
)
from veneer.layers import Factor


class Mixed(nn.Module):
    """Every kind of layer in one model, Linear and transformers' Conv1D among them, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv = SamePadConv2d((1, 2), 3, image_size=8)
        self.grouped = nn.Conv1d(2, 4, 3, padding="same", groups=2)
        self.linear = nn.Linear(32, 8)
        self.conv1d = Conv1D(8, 8)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 8) integer -> (batch, 11)."""
        h = self.conv(self.embed(x).unsqueeze(1))
        h = self.grouped(h.mean(-1))
        h = self.conv1d(self.linear(h.flatten(1)))
        h, _ = self.rnn(self.norm(h).unsqueeze(1))
        return self.head(h.squeeze(1))


TARGETS = ["embed", "conv", "grouped", "linear", "conv1d"]


def mixed() -> Mixed:
    """The model with the same values each time."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return Mixed().eval()


def inputs() -> Tensor:
    return torch.arange(24).view(3, 8) % 11


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": TARGETS, **more})


# -- failures ------------------------------------------------------------------------------------


class NotIdentity(nn.Conv1d):
    """A layer whose base breaks when its factors are computed: after everything was matched."""

    @property
    def in_channels(self) -> int:
        raise RuntimeError("broken on purpose")

    @in_channels.setter
    def in_channels(self, value: int) -> None:
        pass


FAILED_INJECTIONS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "nothing matches": ({"target_modules": ["nowhere"]}, TargetError),
    "one target is refused": ({"target_modules": ["linear", "rnn"]}, TargetError),
    "groups do not divide the rank": ({"r": 3}, TargetError),
    "init refuses one layer": (INITS["LoftQ"], TargetError),
    "lora_bias refuses one layer": ({"lora_bias": True}, TargetError),
    "variant does not exist": ({"use_qalora": True}, ConfigError),
    "init does not exist": ({"init_lora_weights": "eva_2"}, ConfigError),
    "saved and targeted": ({"modules_to_save": ["linear"]}, TargetError),
}


@pytest.mark.parametrize("reason", FAILED_INJECTIONS)
@pytest.mark.parametrize("door", ["get_peft_model", "inject_adapter_in_model", "add_adapter"])
def test_a_failed_injection_leaves_the_model_as_it_was(reason: str, door: str) -> None:
    options, error = FAILED_INJECTIONS[reason]
    model: nn.Module = mixed().train()
    if door == "add_adapter":
        model = get_peft_model(model, config(target_modules=["linear"]), "first")
    before = Snapshot(model)
    with pytest.raises(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if door == "get_peft_model":
            get_peft_model(model, config(**options))
        elif door == "inject_adapter_in_model":
            inject_adapter_in_model(config(**options), model)
        else:
            model.add_adapter("second", config(**options))
    before.assert_same(model)
    if door == "add_adapter":
        assert list(model.peft_config) == ["first"]


def test_an_injection_that_breaks_half_way_leaves_the_model_as_it_was() -> None:
    model = mixed()
    model.last = NotIdentity(2, 2, 1)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        get_peft_model(model, config(target_modules=[*TARGETS, "last"]))
    before.assert_same(model)


@pytest.mark.parametrize("name", ["first", "a.b", "", "keys", "../up"])
def test_an_unusable_or_taken_name_changes_nothing(name: str) -> None:
    model = get_peft_model(mixed(), config(), "first")
    before = Snapshot(model)
    with pytest.raises(AdapterNameError):
        model.add_adapter(name, config())
    before.assert_same(model)


def _infinite(model: PeftModel) -> None:
    # The last layer in model order: everything before it has been merged when it fails.
    with torch.no_grad():
        model.base_model.model.conv1d.lora_B["default"].weight[0, 0] = float("inf")


FAILED_MERGES: dict[str, tuple[Callable[[PeftModel], Any], dict[str, Any], dict[str, Any]]] = {
    "the last layer is not finite": (_infinite, {"target_modules": TARGETS[1:]}, {"safe_merge": True}),
    "a weight is tied": (lambda model: None, {}, {}),
    "lora_bias has no place": (
        lambda model: None,
        {"target_modules": ["linear", "head"], "lora_bias": True},
        {"untie": True},
    ),
}


@pytest.mark.parametrize("reason", FAILED_MERGES)
@pytest.mark.parametrize("door", ["merge_adapter", "merge_and_unload"])
def test_a_failed_merge_leaves_the_model_as_it_was(reason: str, door: str) -> None:
    spoil, options, arguments = FAILED_MERGES[reason]
    model = get_peft_model(mixed(), config(**options))
    train(model, "default")
    spoil(model)
    expected = model(inputs())
    values = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(MergeError):
        getattr(model, door)(**arguments)
    assert list(model.peft_config) == ["default"]
    assert not any(layer.merged for layer in model.base_model.layers().values())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, values[name]), name
    assert torch.equal(model(inputs()).nan_to_num(0), expected.nan_to_num(0))


def _edit(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _truncate(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def _other_targets(directory: Path) -> None:
    file = directory / "adapter_config.json"
    values = json.loads(file.read_text())
    values["target_modules"] = ["linear", "rnn"]
    file.write_text(json.dumps(values))
    _edit(directory, lambda tensors: None)  # without the record of the configuration that was saved


FAILED_LOADS: dict[str, tuple[Callable[[Path], Any], type[VeneerError]]] = {
    "one tensor is missing": (lambda d: _edit(d, lambda t: t.pop(next(iter(t)))), LoadMismatchError),
    "one tensor is too many": (lambda d: _edit(d, lambda t: t.update(x=torch.ones(1))), LoadMismatchError),
    "one tensor has another shape": (
        lambda d: _edit(d, lambda t: t.update({next(iter(t)): torch.ones(3, 3)})),
        LoadMismatchError,
    ),
    "the file is truncated": (_truncate, AdapterFileError),
    "a target cannot be adapted": (_other_targets, TargetError),
    "there is no file": (lambda d: (d / "adapter_model.safetensors").unlink(), AdapterFileError),
}


@pytest.mark.parametrize("reason", FAILED_LOADS)
@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_a_failed_load_leaves_the_model_as_it_was(reason: str, door: str, tmp_path: Path) -> None:
    spoil, error = FAILED_LOADS[reason]
    get_peft_model(mixed(), config(modules_to_save=["norm"], bias="all")).save_pretrained(tmp_path)
    spoil(tmp_path)
    model: nn.Module = mixed().train()
    if door == "load_adapter":
        model = get_peft_model(model, config(target_modules=["linear"]), "first")
    before = Snapshot(model)
    with pytest.raises(error):
        if door == "from_pretrained":
            PeftModel.from_pretrained(model, tmp_path)
        else:
            model.load_adapter(tmp_path, "second")
    before.assert_same(model)


# -- files -------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A model around one module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.target = module

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", EACH_CASE)
def test_save_then_load_is_the_identity(made: Combination, dtype: torch.dtype, tmp_path: Path) -> None:
    def base() -> Holder:
        return Holder(made.dense().eval()).to(dtype)

    x = made.x().to(dtype) if made.x().is_floating_point() else made.x()
    model = get_peft_model(base(), made.config(target_modules=["target"]), autocast_adapter_dtype=False)
    train(model, "default")
    model.save_pretrained(tmp_path)
    # Trainable too: torch takes other kernels for weights that require a gradient.
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, autocast_adapter_dtype=False)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() == file.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == file[name].dtype == tensor.dtype == dtype, name
        assert torch.equal(theirs[name], tensor) and torch.equal(file[name], tensor), name
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_save_then_load_is_the_identity_for_all_kinds_together(bias: str, tmp_path: Path) -> None:
    model = get_peft_model(mixed(), config(bias=bias, modules_to_save=["norm"], use_rslora=True))
    train(model, "default")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path)
    base = mixed()
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(again(inputs()), model(inputs()))
    again.unload()
    for (name, after), (_, before) in zip(base.named_parameters(), mixed().named_parameters(), strict=True):
        assert torch.equal(after, before), name


def test_saving_while_merged_or_disabled_saves_the_same(tmp_path: Path) -> None:
    model = get_peft_model(mixed(), config(target_modules=TARGETS[1:]))
    train(model, "default")
    expected = get_peft_model_state_dict(model)
    model.merge_adapter()
    with model.disable_adapter():
        model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert file.keys() == expected.keys()
    assert all(torch.equal(file[name], expected[name]) for name in expected)


# -- the rest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["get_peft_model", "inject_adapter_in_model", "add_adapter", "load_adapter"])
def test_configuration_of_the_caller_is_not_changed(door: str, tmp_path: Path) -> None:
    given = config(target_modules="all-linear", modules_to_save=["norm"], rank_pattern={"linear": 2})
    before = copy.deepcopy(vars(given))
    if door == "get_peft_model":
        get_peft_model(mixed(), given)
    elif door == "inject_adapter_in_model":
        inject_adapter_in_model(given, mixed())
    else:
        model = get_peft_model(mixed(), config(), "first")
        if door == "load_adapter":
            get_peft_model(mixed(), given).save_pretrained(tmp_path)
            model.load_adapter(tmp_path, "second", config=given)
        else:
            model.add_adapter("second", given)
    assert vars(given) == before


def factors_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Factor))


def test_torchs_dynamic_quantisation_leaves_the_factors_alone() -> None:
    model = get_peft_model(mixed(), config(target_modules=["linear", "conv1d"]))
    train(model, "default")
    before = {name: m.weight.detach().clone() for name, m in factors_of(model)}
    expected = model(inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantised.base_model.model.linear.base_layer).__module__
    after = dict(factors_of(quantised))
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(after[name].weight, weight), name
    # 8-bit weights and activations: the outputs agree to a few per cent.
    error = (quantised(inputs()) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_deepcopy_of_a_model_is_independent() -> None:
    model = get_peft_model(mixed(), config(target_modules=TARGETS[1:], modules_to_save=["norm"]))
    train(model, "default")
    model.merge_adapter()
    expected = model(inputs())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs()), expected)
    twin.unmerge_adapter()
    train(twin, "default", seed=8)
    assert torch.equal(model(inputs()), expected)
    model.unload()
    for (name, after), (_, before) in zip(
        model.get_base_model().named_parameters(), mixed().named_parameters(), strict=True
    ):
        assert torch.equal(after, before), name
