"""The face: biases, whole modules, merging, counting, devices of a spread model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.laws.cases import train
from tests.tolerances import OPS_KEPT, assert_close
from veneer import (
    ConfigError,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PeftType,
    VeneerWarning,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from veneer.errors import AdapterNameError, CheckpointError, MergeError, UnknownOptionError, VeneerError


class Net(nn.Module):
    """Two linears, a norm and a head, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (...) integer -> (..., 3)."""
        h = torch.tanh(self.first(self.embed(x)))
        return self.head(self.second(self.norm(h)))


X = torch.arange(10).view(2, 5)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["first", "second"], **more})


def adapted(name: str = "default", **more: Any) -> PeftModel:
    model = get_peft_model(net(), config(**more), name).eval()
    train(model, name)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}


def assert_is_the_base(base: nn.Module) -> None:
    expected = net()
    assert [n for n, _ in base.named_modules()] == [n for n, _ in expected.named_modules()]
    for (name, after), (_, before) in zip(base.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(after, before), name


def shift_biases(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter.add_(1.0)


# -- biases ---

BIASES = {
    "none": set(),
    "lora_only": {"first.base_layer.bias", "second.base_layer.bias"},
    "all": {"first.base_layer.bias", "second.base_layer.bias", "norm.bias", "head.bias"},
}


@pytest.mark.parametrize("bias", BIASES)
def test_bias_modes_train_what_they_say_and_save_it(bias: str) -> None:
    model = adapted(bias=bias)
    assert {n for n in trainable(model) if "lora_" not in n} == BIASES[bias]
    saved = {k.removeprefix("base_model.model.") for k in get_peft_model_state_dict(model)}
    assert {k for k in saved if "lora_" not in k} == BIASES[bias]


@pytest.mark.parametrize("way", ["unload", "delete"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("merged", [False, True])
def test_trained_biases_are_given_back(way: str, bias: str, merged: bool) -> None:
    model = adapted("a", bias=bias, lora_bias=True)
    shift_biases(model)
    model.add_adapter("b", config(target_modules=["head"]))
    if merged:
        model.merge_adapter(["a", "b"])
    if way == "delete":
        with pytest.warns(VeneerWarning, match="no adapter is active"):
            model.delete_adapter("a")
        assert not trainable(model)
        model.delete_adapter("b")
    assert_is_the_base(model.base_model.unload())


def test_trained_biases_are_frozen_with_their_adapter() -> None:
    model = adapted("a", bias="all")
    model.add_adapter("b", config())
    model.set_adapter("b")
    assert all(".b." in n for n in trainable(model))
    model.set_adapter("a")
    assert BIASES["all"] < trainable(model)
    model.set_adapter("a", inference_mode=True)
    assert not trainable(model)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_names_of_biases_do_not_depend_on_other_adapters(bias: str, tmp_path: Path) -> None:
    model = adapted("a", bias=bias)
    alone = get_peft_model_state_dict(model, adapter_name="a")
    model.add_adapter("b", config(target_modules=["head"], modules_to_save=["norm"]))
    shift_biases(model)
    assert get_peft_model_state_dict(model, adapter_name="a").keys() == alone.keys()
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    again = PeftModel.from_pretrained(net(), tmp_path / "a")
    model.set_adapter("a")
    assert_close(again(X), model(X))


def test_a_second_adapter_cannot_train_biases_too() -> None:
    model = adapted("a", bias="all")
    with pytest.raises(ConfigError, match="one set of them"):
        model.add_adapter("b", config(bias="lora_only"))
    assert list(model.peft_config) == ["a"]


def test_disabling_says_that_trained_biases_stay() -> None:
    model = adapted(bias="all")
    with pytest.warns(VeneerWarning, match="keeps them"), model.disable_adapter():
        pass


# -- modules that are trained whole ---


def test_whole_modules_are_copied_trained_and_switched() -> None:
    model = adapted("a", modules_to_save=["head", "norm"])
    wrapper = model.base_model.model.head
    assert {"head.modules_to_save.a.weight", "norm.modules_to_save.a.bias"} < trainable(model)
    assert not [n for n in trainable(model) if "original_module" in n]
    shift_biases(model)
    trained = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X))
    model.add_adapter("b", config(modules_to_save=["head"]))
    model.set_adapter("b")
    assert torch.equal(wrapper(torch.ones(8)), net().head(torch.ones(8)))
    model.set_adapter("a")
    assert torch.equal(model(X), trained)
    assert wrapper.weight is wrapper.modules_to_save["a"].weight


def test_two_adapters_with_copies_of_one_module_cannot_both_be_active() -> None:
    model = adapted("a", modules_to_save=["head"])
    model.add_adapter("b", config(modules_to_save=["head"]))
    with pytest.raises(VeneerError, match="their own copy"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]


def test_merge_and_unload_keeps_the_trained_copies_and_unload_the_originals() -> None:
    model = adapted(modules_to_save=["head"], bias="all")
    shift_biases(model)
    expected = model(X)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.head) is nn.Linear
    assert_close(merged(X), expected)
    assert_is_the_base(model.base_model.unload())


# -- merging ---


def test_merging_into_bfloat16_reports_what_was_kept_and_warns() -> None:
    model = get_peft_model(net().bfloat16(), config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.01)
    with pytest.warns(VeneerWarning, match="survives rounding"):
        report = model.merge_adapter()
    layer = model.base_model.layers()["first"]
    original = layer.original_base().weight.float()
    wanted = layer.get_delta_weight("default")
    error = layer.base_layer.weight.float() - original - wanted
    assert report.kept["first"] == pytest.approx(1 - float(error.norm() / wanted.norm()), abs=OPS_KEPT.atol)
    assert report.worst <= report.mean < 0.8


def test_merging_what_is_not_active_adds_it() -> None:
    model = adapted("a")
    model.add_adapter("b", config())
    train(model, "b", seed=5)
    model.set_adapter(["a", "b"])
    both = model(X)
    model.set_adapter("a")
    model.merge_adapter(["b"])
    assert_close(model(X), both)
    with pytest.warns(VeneerWarning, match="no longer active"):
        model.set_adapter("a")
    model.set_adapter(["a", "b"])
    assert_close(model(X), both)


def test_merging_an_unknown_adapter_names_those_that_exist() -> None:
    with pytest.raises(AdapterNameError, match="'default'"):
        adapted().merge_adapter(["other"])


@pytest.mark.parametrize("style", ["parametrization", "weight_norm"])
def test_computed_weights_are_adapted_and_their_merge_is_refused(style: str) -> None:
    base = net()
    if style == "parametrization":
        nn.utils.parametrizations.weight_norm(base.first)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(base.first)
    expected = base(X)
    model = get_peft_model(base, config())
    assert_close(model(X), expected)
    train(model, "default")
    out = model(X)
    assert not torch.allclose(out, expected)
    with pytest.raises(MergeError, match=r"first: .*computed"):
        model.merge_adapter()
    assert torch.equal(model(X), out)


def test_a_float16_merge_that_overflows_is_refused_and_nothing_changed() -> None:
    model = get_peft_model(net().half(), config(target_modules=["first", "embed", "second"]))
    with torch.no_grad():
        model.base_model.model.second.lora_A["default"].weight.fill_(300.0)
        model.base_model.model.second.lora_B["default"].weight.fill_(300.0)
    with pytest.raises(MergeError, match=r"second"):
        model.merge_and_unload()
    base = model.base_model.unload()
    for (name, after), (_, before) in zip(base.named_parameters(), net().named_parameters(), strict=True):
        assert torch.equal(after, before.half()), name


# -- state dicts ---


def test_set_state_dict_reports_and_refuses() -> None:
    model, other = adapted(), adapted()
    state = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(model).items()}
    result = set_peft_model_state_dict(other, state)
    assert result == ([], [])
    assert all(torch.equal(v, state[k]) for k, v in get_peft_model_state_dict(other).items())
    key = next(iter(state))
    before = get_peft_model_state_dict(copy.deepcopy(other))
    with pytest.raises(RuntimeError, match=re.escape(key)):
        set_peft_model_state_dict(other, {**state, key: torch.ones(1, 1)})
    with pytest.raises(RuntimeError):
        set_peft_model_state_dict(other, {"nothing.fits": torch.ones(1)})
    assert all(torch.equal(v, before[k]) for k, v in get_peft_model_state_dict(other).items())
    partial = {k: v for k, v in state.items() if k != key}
    with pytest.warns(VeneerWarning, match=re.escape(key)):
        assert set_peft_model_state_dict(other, partial).missing_keys == [key]


def test_counts_and_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(Net().to("meta"), config())
    total = 64 + sum(p.numel() for p in Net().parameters())
    assert model.get_nb_trainable_parameters() == (64, total)
    model.print_trainable_parameters()
    line = f"trainable params: 64 || all params: {total} || trainable%: {6400 / total}\n"
    assert capsys.readouterr().out == line


# -- adding and loading leave what is trainable ---


def test_adding_or_loading_another_adapter_leaves_the_active_one_as_it_is(tmp_path: Path) -> None:
    model = adapted("a")
    before = trainable(model)
    model.add_adapter("b", config(target_modules=["head"]))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "b", "c")
    assert trainable(model) == before and model.active_adapters == ["a"]
    frozen = PeftModel.from_pretrained(net(), tmp_path / "a", "a")
    frozen.add_adapter("b", config())
    frozen.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "cat")
    assert not trainable(frozen)


# -- models that are spread or offloaded ---


def _offloaded_to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu")


def _offloaded_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def _dispatched(model: nn.Module, folder: Path) -> nn.Module:
    places: dict[str, str] = {"embed": "cpu", "first": "disk", "norm": "cpu", "second": "disk", "head": "cpu"}
    accelerate.utils.offload_state_dict(str(folder), model.state_dict())
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


SPREAD: list[Callable[[nn.Module, Path], nn.Module]] = [_offloaded_to_cpu, _offloaded_to_disk, _dispatched]


@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("targets", [["first", "second"], ["embed", "head"]])
def test_spread_models_run_forward_backward_merge_and_save(
    spread: Callable[[nn.Module, Path], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    offload, saved = tmp_path / "offload", tmp_path / "adapter"
    base = spread(net(), offload)
    files = {p.name: p.read_bytes() for p in offload.glob("*")}
    model = get_peft_model(base, config(target_modules=targets))
    whole = get_peft_model(net(), config(target_modules=targets))
    for each in (model, whole):
        train(each, "default")
        each(X).square().sum().backward()
    assert_close(model(X), whole(X))
    for (name, ours), (_, theirs) in zip(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad),
        ((n, p) for n, p in whole.named_parameters() if p.requires_grad),
        strict=True,
    ):
        assert_close(ours.grad, theirs.grad), name
    expected = model(X).detach()
    model.merge_adapter()
    assert_close(model(X), expected)
    with model.disable_adapter():
        assert_close(model(X), net()(X))
    model.save_pretrained(saved)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    again = PeftModel.from_pretrained(spread(net(), tmp_path / "other"), saved)
    assert_close(again(X), expected)
    assert {p.name: p.read_bytes() for p in offload.glob("*")} == files
    assert torch.equal(model.base_model.unload()(X), net()(X))


def test_a_model_offloaded_after_it_was_adapted_runs_and_saves(tmp_path: Path) -> None:
    model = adapted()
    expected = model(X)
    state = get_peft_model_state_dict(copy.deepcopy(model))
    model = accelerate.cpu_offload(model, execution_device="cpu")
    assert_close(model(X), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert_close(again(X), expected)
    assert get_peft_model_state_dict(again).keys() == state.keys()


@pytest.mark.parametrize("spread", SPREAD)
def test_whole_modules_of_a_spread_model_are_trained_and_saved(
    spread: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    model = get_peft_model(spread(net(), tmp_path / "offload"), config(modules_to_save=["head"]))
    train(model, "default")
    model(X).square().sum().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                assert parameter.grad is not None, name
                parameter.sub_(parameter.grad)
    expected = model(X)
    assert not torch.allclose(model.base_model.model.head.original_module(torch.ones(8)), expected[0, 0])
    model.save_pretrained(tmp_path / "adapter")
    assert_close(PeftModel.from_pretrained(net(), tmp_path / "adapter")(X), expected)
    again = PeftModel.from_pretrained(spread(net(), tmp_path / "other"), tmp_path / "adapter")
    assert_close(again(X), expected)


def test_misspelt_keywords_of_loading_and_saving_are_named(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    model.save_pretrained(tmp_path)
    with pytest.raises(UnknownOptionError, match=r"'is_trainble' .did you mean 'is_trainable'"):
        PeftModel.from_pretrained(net(), tmp_path, is_trainble=True)
    with pytest.raises(UnknownOptionError, match=r"'check_bse' .did you mean 'check_base'"):
        model.load_adapter(tmp_path, "other", check_bse=False)
    with pytest.raises(UnknownOptionError, match=r"'safe_serialisation' .did you mean 'safe_serialization'"):
        model.save_pretrained(tmp_path / "new", safe_serialisation=False)
    assert not (tmp_path / "new").exists() and list(model.peft_config) == ["default"]


def test_keywords_that_trainers_and_hubs_pass_are_accepted(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    model.save_pretrained(
        tmp_path / "a",
        state_dict=None,
        save_function=torch.save,
        max_shard_size="5GB",
        token=None,
        variant=None,
    )
    fetched = {
        "revision": "main",
        "token": None,
        "cache_dir": None,
        "local_files_only": True,
        "subfolder": "a",
    }
    again = PeftModel.from_pretrained(net(), tmp_path, device_map="auto", torch_device="cpu", **fetched)
    again.load_adapter(tmp_path, "other", max_memory=None, offload_folder=None, _commit_hash=None, **fetched)
    assert list(again.peft_config) == ["default", "other"]
    with pytest.warns(VeneerWarning, match=r"uploads nothing: call push_to_hub"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)


def test_save_embedding_layers_has_three_values(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    for value in ("bogus", None, 2):
        with pytest.raises(ConfigError, match=r"save_embedding_layers must be True, False or 'auto', got"):
            model.save_pretrained(tmp_path / "new", save_embedding_layers=value)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="save_embedding_layers"):
            get_peft_model_state_dict(model, save_embedding_layers=value)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_what_is_no_configuration_is_refused_by_name(tmp_path: Path) -> None:
    model: Any = get_peft_model(net(), config())
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="config: a LoraConfig is needed, got dict"):
        PeftModel.from_pretrained(net(), tmp_path, config={"r": 2})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config: a LoraConfig is needed, got dict"):
        model.load_adapter(tmp_path, "other", config={"r": 2})
    with pytest.raises(ConfigError, match="a LoraConfig is needed, got NoneType"):
        model.add_adapter("other", None)
    with pytest.raises(CheckpointError, match="mapping of names to tensors is needed, got NoneType"):
        set_peft_model_state_dict(model, None)  # type: ignore[arg-type]
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"(": "x"}, r"'\(' is not a valid regular expression"),
        ({"first": r"\9"}, "is not a valid replacement for 'first'"),
        ({"first": r"\g<no>"}, "is not a valid replacement for 'first'"),
        ({"first": 3}, "3 is not a valid replacement"),
        ([("a", "b")], "a mapping of regular expressions .* got list"),
    ],
)
def test_an_impossible_renaming_is_refused(mapping: Any, message: str, tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        model.load_adapter(tmp_path, "other", key_mapping=mapping)
    assert list(model.peft_config) == ["default"]


def test_a_renaming_that_would_lose_a_tensor_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    model.save_pretrained(tmp_path)
    for mapping in ({r".*lora_([AB]).*": r"same.lora_\1.weight"}, lambda key: "same"):
        with pytest.raises(
            ConfigError, match=r"key_mapping gives several keys of the file one name: .* and .* -> "
        ):
            model.load_adapter(tmp_path, "other", key_mapping=mapping)
        with pytest.raises(ConfigError, match="key_mapping gives several keys"):
            load_peft_weights(tmp_path, key_mapping=mapping)
    assert list(model.peft_config) == ["default"]


def test_the_method_of_a_model_is_told_whatever_is_active() -> None:
    model = get_peft_model(net(), config())
    assert model.peft_type == PeftType.LORA
    model.add_adapter("other", config())
    with pytest.warns(VeneerWarning, match="was the active one"):
        model.delete_adapter("default")
    assert not model.active_adapters
    assert hasattr(model, "peft_type") and model.peft_type == PeftType.LORA
    assert PeftModel(net()).peft_type is None


def test_a_mixed_model_is_one_whose_adapters_work_together() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(net, LoraConfig(target_modules=["0"]), "a", mixed=True)
    assert isinstance(model, PeftMixedModel)
    for name in "bcd":
        model.add_adapter(name, LoraConfig(target_modules=["1"]))
    model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a", "b"]
    with pytest.raises(AdapterNameError, match="'e'"):
        model.delete_adapter(["c", "e"])
    assert list(model.peft_config) == ["a", "b", "c", "d"]
    model.delete_adapter(["c", "d"])
    assert list(model.peft_config) == ["a", "b"]


def test_what_no_adapter_can_do_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(net(), config(bias="lora_only"))
    with pytest.raises(ConfigError, match="LoraConfig is needed, got dict"):
        get_peft_model(net(), {"r": 2})
    with pytest.raises(AdapterNameError, match="'default' already exists"):
        model.copy_adapter("default", "default")
    with pytest.raises(ConfigError, match="biases of the base"):
        model.copy_adapter("default", "second")
    with pytest.raises(AdapterNameError, match="'default' already exists"):
        model.add_adapter("default", config())
    with pytest.raises(MergeError, match="undo='residual' does not exist"):
        model.merge_adapter(undo="residual")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no adapter to save"):
        model.save_pretrained(tmp_path, selected_adapters=[])
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(AdapterNameError, match="no module of the model holds the adapter 'other'"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(model), adapter_name="other")
    assert list(model.peft_config) == ["default"] and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_without_an_active_adapter_none_has_a_configuration_to_show() -> None:
    model = get_peft_model(net(), config())
    model.add_adapter("second", config())
    with pytest.warns(VeneerWarning, match="no adapter is active now"):
        model.delete_adapter("default")
    with pytest.raises(AdapterNameError, match=r"no adapter is active; .*second"):
        model.active_peft_config  # noqa: B018


def test_what_was_merged_for_good_cannot_be_unmerged() -> None:
    model = get_peft_model(net(), config())
    train(model, "default")
    model.merge_adapter(undo=None)
    merged = model(X)
    with pytest.raises(MergeError, match=r"cannot be unmerged:\n  - first.*\n  - second"):
        model.unmerge_adapter()
    assert torch.equal(model(X), merged)


def test_a_merge_that_is_not_finite_is_refused_where_the_weight_is_written_anew() -> None:
    model = get_peft_model(net(), config(use_dora=True))
    with torch.no_grad():
        model.get_base_model().second.lora_A["default"].weight.fill_(float("nan"))
    weight = model.get_base_model().first.base_layer.weight.clone()
    with pytest.raises(MergeError, match=r"second: .*NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.get_base_model().first.base_layer.weight, weight)


# -- names that PEFT's users call


def test_the_report_of_a_load_has_the_names_of_peft_and_torch(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    model.save_pretrained(tmp_path)
    report = model.load_adapter(tmp_path, "second")
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    tensors = load_peft_weights(tmp_path)
    removed = sorted(tensors)[0]
    (tmp_path / "less").mkdir()
    save_file({k: t for k, t in tensors.items() if k != removed}, tmp_path / "less/adapter_model.safetensors")
    (tmp_path / "less/adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    with pytest.warns(VeneerWarning, match="expected by the model, but not in the file"):
        report = model.load_adapter(tmp_path / "less", "third", strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([removed], [])


def test_an_adapter_that_is_disabled_or_not_active_is_not_at_work() -> None:
    model = get_peft_model(net(), config())
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    assert model.has_active_enabled_adapter
    model.set_adapter([])
    assert not model.has_active_enabled_adapter


def test_a_model_without_a_config_gets_none() -> None:
    model = get_peft_model(net(), config())
    assert not hasattr(model, "config")
    base = net()
    base.config = {"model_type": "own"}
    assert get_peft_model(base, config()).config is base.config


def test_a_model_can_be_prepared_for_gradient_checkpointing() -> None:
    model, called = get_peft_model(net(), config()), []
    other = net()
    model.prepare_model_for_gradient_checkpointing(other)  # it has no method for it
    other.enable_input_require_grads = lambda: called.append(1)
    model.prepare_model_for_gradient_checkpointing(other)
    other.is_quantized = True
    model.prepare_model_for_gradient_checkpointing(other)
    assert called == [1]


def test_merging_what_is_merged_is_said() -> None:
    model = get_peft_model(net(), config(init_lora_weights=False))
    model.merge_adapter()
    with pytest.warns(VeneerWarning, match="'default' had been merged before and stays as it was merged"):
        model.merge_adapter()


def test_adapted_modules_and_parameters_are_named() -> None:
    model = get_peft_model(net(), LoraConfig(target_modules=["first"], target_parameters=["second.weight"]))
    assert model.targeted_module_names == ["first"]
    assert model.targeted_parameter_names == ["second.weight"]
    assert model.get_submodule("base_model.model.first").supports_lora_conversion()
