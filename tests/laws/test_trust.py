"""What users lose silently elsewhere: one test for each row of the table of promises, named by its row."""

from __future__ import annotations

import copy
import json
import re
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.laws.cases import train
from tests.tolerances import OPS_SPECTRUM, assert_close
from veneer import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeneerWarning,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    plan,
)
from veneer.errors import (
    AdapterNameError,
    BaseMismatchError,
    CombineError,
    LoadMismatchError,
    MergeError,
    TargetError,
    UnknownOptionError,
)


class Block(nn.Module):
    """One layer of a small model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


class Lm(nn.Module):
    """A small language model with a tied head."""

    def __init__(self, layers: int = 2, size: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(layers))
        self.lm_head = nn.Linear(size, 13, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(h)


def lm(seed: int = 0, **sizes: int) -> Lm:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Lm(**sizes).eval()


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **more})


def adapted(name: str = "default", **more: Any) -> PeftModel:
    model = get_peft_model(lm(), config(**more), name).eval()
    train(model, name)
    return model


X = torch.arange(10).view(2, 5)


def edit(directory: Path, change: Any) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, file)


# -- row 1: an adapter that loads and is not applied ---


def test_row_1_every_tensor_is_accounted_for_in_one_error(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["base_model.model.layers.0.q_proj.lora_A.weight"]
        tensors["base_model.model.layers.9.q_proj.lora_A.weight"] = torch.ones(4, 8)
        tensors["base_model.model.layers.1.v_proj.lora_B.weight"] = torch.ones(5, 4)

    edit(tmp_path, spoil)
    with pytest.raises(LoadMismatchError) as caught:
        PeftModel.from_pretrained(lm(), tmp_path)
    text = str(caught.value)
    for part in (
        "layers.0.q_proj.lora_A",
        "layers.9.q_proj.lora_A",
        "layers.1.v_proj.lora_B",
        "(5, 4)",
        "(8, 4)",
    ):
        assert part in text, text


def test_row_1_another_depth_is_named_as_the_cause(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(LoadMismatchError, match="layers"):
        PeftModel.from_pretrained(lm(layers=3), tmp_path, check_base=False)


def test_row_1_a_prefix_is_mapped_and_said(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    edit(
        tmp_path,
        lambda t: {k.replace("base_model.model.", "base_model.model.model."): v for k, v in t.items()},
    )
    with pytest.warns(VeneerWarning, match=re.escape("model.model.")):
        loaded = PeftModel.from_pretrained(lm(), tmp_path)
    assert_close(loaded(X), model(X))


def test_row_1_not_strict_returns_the_report(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update(other=torch.ones(1)))
    model = PeftModel(lm())
    with pytest.warns(VeneerWarning, match="nothing in the model takes them"):
        report = model.load_adapter(tmp_path, "default", strict=False)
    assert report.unexpected == ("other",) and not report.ok


# -- row 3: less trained than asked ---


def test_row_3_a_misspelt_target_beside_a_good_one_is_said_with_a_suggestion() -> None:
    with pytest.warns(VeneerWarning, match=r"v_porj.*v_proj"):
        get_peft_model(lm(), config(target_modules=["q_proj", "v_porj"]))
    with pytest.raises(TargetError, match=r"v_porj.*v_proj"):
        get_peft_model(lm(), config(target_modules=["q_proj", "v_porj"]), strict_targets=True)


def test_row_3_misspelt_modules_to_save_and_a_layer_out_of_range_are_said() -> None:
    with pytest.warns(VeneerWarning, match=r"lm_haed.*lm_head"):
        get_peft_model(lm(), config(modules_to_save=["lm_haed"]))
    with pytest.warns(VeneerWarning, match="7"):
        get_peft_model(lm(), config(layers_to_transform=[0, 7]))


def test_row_3_a_plan_is_a_dry_run() -> None:
    model = lm()
    before = list(model.named_modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = plan(model, config(target_modules=["q_proj", "nope"]))
    assert list(model.named_modules()) == before
    assert [s.path for s in result.specs] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert "nope" in str(result) and "q_proj" in str(result)


# -- row 4: tied weights ---


@pytest.mark.parametrize("target", ["lm_head", "embed"])
def test_row_4_merging_into_a_tied_weight_is_refused_or_untied(target: str) -> None:
    model = adapted(target_modules=[target])
    expected = model(X)
    other = "embed" if target == "lm_head" else "lm_head"
    with pytest.raises(MergeError, match=other):
        model.merge_and_unload()
    assert_close(model(X), expected)
    merged = model.merge_and_unload(untie=True)
    assert merged.embed.weight is not merged.lm_head.weight
    assert torch.equal(getattr(merged, other).weight, lm().embed.weight)
    assert_close(merged(X), expected)


# -- row 6 and 7: merging ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_6_a_hundred_merges_do_not_drift(dtype: torch.dtype) -> None:
    model = get_peft_model(lm().to(dtype), config())
    train(model, "default")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*survives rounding.*")
        for _ in range(100):
            model.merge_adapter()
            model.unmerge_adapter()
    base = model.unload()
    for (name, after), (_, before) in zip(base.named_parameters(), lm().named_parameters(), strict=True):
        assert torch.equal(after, before.to(dtype)), name


def test_row_7_merging_one_of_two_active_adapters_keeps_the_other() -> None:
    model = adapted("a")
    model.add_adapter("b", config(r=2))
    train(model, "b", seed=5)
    model.set_adapter(["a", "b"])
    expected = model(X)
    model.merge_adapter(["a"])
    assert_close(model(X), expected)


def test_row_7_a_forward_while_disabled_writes_nothing() -> None:
    model = adapted()
    model.merge_adapter()
    before = {n: (p._version, p.clone()) for n, p in model.named_parameters()}
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(X), lm()(X))
    for name, parameter in model.named_parameters():
        assert parameter._version == before[name][0] and torch.equal(parameter, before[name][1]), name


# -- row 8: another base of the same shape ---


def test_row_8_another_base_of_the_same_shape_is_noticed(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    other = lm(seed=1)
    with pytest.raises(BaseMismatchError, match="another base"):
        PeftModel.from_pretrained(other, tmp_path)
    PeftModel.from_pretrained(other, tmp_path, check_base=False)
    PeftModel.from_pretrained(lm(), tmp_path)


class SayingLm(Lm):
    """One that says where its embedding is, so that an adapter of it takes the embedding along."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def saying_lm(seed: int = 0, layers: int = 2) -> SayingLm:
    model = SayingLm(layers)
    model.load_state_dict(lm(seed, layers=layers).state_dict())
    return model.eval()


def save_with_embedding(base: nn.Module, place: Path) -> None:
    model = get_peft_model(base, LoraConfig(target_modules=["embed"]))
    model.save_pretrained(place, save_embedding_layers=True)
    assert any(".embed.base_layer." in key for key in load_file(place / "adapter_model.safetensors"))


def test_row_8_another_base_is_noticed_by_weights_that_are_not_adapted(tmp_path: Path) -> None:
    save_with_embedding(saying_lm(), tmp_path / "embed")
    adapted().save_pretrained(tmp_path / "q_proj")
    other = saying_lm(seed=1)
    other.embed.load_state_dict(lm().embed.state_dict())
    for block, own in zip(other.layers, lm().layers, strict=True):
        block.q_proj.load_state_dict(own.q_proj.state_dict())
    for place in ("embed", "q_proj"):  # the file brings the one weight along, the base shares the other
        with pytest.raises(BaseMismatchError, match="another base"):
            PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / place)
        PeftModel.from_pretrained(saying_lm(), tmp_path / place)


def test_row_8_an_architecture_of_other_sizes_is_noticed(tmp_path: Path) -> None:
    base, deeper = saying_lm(), saying_lm(layers=4)
    deeper.load_state_dict(base.state_dict(), strict=False)
    base.config, deeper.config = ({"num_hidden_layers": n, "vocab_size": 13} for n in (2, 4))
    save_with_embedding(base, tmp_path)
    with pytest.raises(BaseMismatchError, match="num_hidden_layers was 2 and is 4"):
        PeftModel.from_pretrained(deeper, tmp_path)


def test_row_8_the_fingerprint_is_the_unmerged_base(tmp_path: Path) -> None:
    model = adapted()
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(lm(), tmp_path)


# -- row 9: combining ---


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_row_9_weight_one_is_the_identity(kind: str) -> None:
    model = adapted("a", use_rslora=True)
    expected = model(X)
    model.base_model.add_weighted_adapter(["a"], [1.0], "b", kind)
    model.set_adapter("b")
    assert_close(model(X), expected)


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_row_9_a_difference_is_a_difference(kind: str) -> None:
    model = adapted("a")
    model.add_adapter("b", config(r=2, use_rslora=True))
    train(model, "b", seed=5)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "c", kind)
    layer = model.base_model.model.layers[0].q_proj
    assert_close(layer.get_delta_weight("c"), layer.get_delta_weight("a") - layer.get_delta_weight("b"))


def test_row_9_the_error_of_a_cut_rank_is_reported() -> None:
    model = adapted("a")
    model.add_adapter("b", config(r=2))
    train(model, "b", seed=5)
    report = model.base_model.add_weighted_adapter(["a", "b"], [1.0, 2.0], "c", "svd", svd_rank=3)
    layers = model.base_model.layers()
    for path, layer in layers.items():
        wanted = layer.get_delta_weight("a") + 2 * layer.get_delta_weight("b")
        error = (layer.get_delta_weight("c") - wanted).norm() / wanted.norm()
        assert report.errors[path] == pytest.approx(float(error), abs=OPS_SPECTRUM.rtol)
        values = torch.linalg.svdvals(wanted)
        assert float(error) == pytest.approx(float(values[3:].norm() / values.norm()), abs=OPS_SPECTRUM.rtol)


def test_row_9_what_cannot_be_combined_is_refused() -> None:
    model = adapted("a", modules_to_save=["lm_head"])
    with pytest.raises(CombineError, match="modules_to_save"):
        model.base_model.add_weighted_adapter(["a"], [1.0], "b")
    assert list(model.peft_config) == ["a"]


# -- row 10: strength ---


def test_row_10_a_suspicious_scaling_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(VeneerWarning, match="0.0625"):
        get_peft_model(lm(), LoraConfig(r=128, target_modules=["q_proj"]))
    with caplog.at_level("INFO", logger="veneer"):
        adapted()
    assert "1.5" in caplog.text


def test_row_10_the_strength_can_be_set() -> None:
    model = adapted("a")
    one = model(X)
    base = lm()(X)
    model.base_model.set_strength("a", 0.0)
    assert_close(model(X), base)
    model.base_model.set_strength("a", 1.0)
    assert torch.equal(model(X), one)


# -- row 12: failed and repeated injection ---


def test_row_12_wrapping_twice_is_an_error_that_names_the_call() -> None:
    model = adapted()
    with pytest.raises(TargetError, match="add_adapter"):
        get_peft_model(model, config())
    with pytest.raises(TargetError, match="add_adapter"):
        get_peft_model(model.get_base_model(), config())
    for whole in (model, model.base_model):
        with pytest.raises(TargetError, match=r"a PeftModel already.*add_adapter"):
            inject_adapter_in_model(config(), whole, "second")
    with pytest.raises(AdapterNameError, match="'default' already"):
        inject_adapter_in_model(config(), model.get_base_model())
    assert sum(1 for m in model.modules() if type(m).__name__ == "LoraLinear") == 4


def test_row_12_a_failed_injection_leaves_nothing_behind() -> None:
    model = lm()
    model.rnn = nn.LSTM(8, 8)
    with pytest.raises(TargetError, match="fused recurrent kernel"):
        inject_adapter_in_model(config(target_modules=["q_proj", "rnn"]), model)
    assert not [m for m in model.modules() if "Lora" in type(m).__name__]
    assert all(p.requires_grad for p in model.parameters())


# -- row 13: resuming ---


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    result = []
    for step in steps:
        x = (X + step) % 13
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return result


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_row_13_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    model = get_peft_model(lm(), config(lora_dropout=0.0))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    losses(model, optimizer, range(5))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    expected = losses(model, optimizer, range(5, 10))
    again = PeftModel.from_pretrained(lm(), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW(trainable(again), lr=0.01)
    optimizer.load_state_dict(state)
    assert losses(again, optimizer, range(5, 10)) == expected


def test_row_13_training_a_frozen_adapter_is_said(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(lm(), tmp_path)
    assert not trainable(model) and not model.training
    with pytest.warns(VeneerWarning, match="is_trainable=True"):
        model.train()


# -- row 17: names ---


def test_row_17_one_call_for_one_several_or_weighted() -> None:
    model = adapted("a")
    model.add_adapter("b", config())
    train(model, "b", seed=5)
    model.set_adapter("b")
    assert model.active_adapters == ["b"]
    model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a", "b"]
    both = model(X)
    model.set_adapter({"a": 0.5, "b": 0.0})
    layer = model.base_model.model.layers[0].q_proj
    assert layer.scaling == {"a": 0.75, "b": 0.0}
    assert not torch.allclose(model(X), both)
    with pytest.raises(AdapterNameError, match="'a', 'b'"):
        model.set_adapter(["a", "c"])


def test_row_17_deleting_the_active_adapter_activates_no_other() -> None:
    model = adapted("a")
    model.add_adapter("b", config())
    train(model, "b", seed=5)
    with pytest.warns(VeneerWarning, match="no adapter is active"):
        model.delete_adapter("a")
    assert model.active_adapters == []
    assert_close(model(X), lm()(X))


def test_row_17_rename_and_copy() -> None:
    model = adapted("a")
    expected = model(X)
    model.base_model.rename_adapter("a", "z")
    assert model.active_adapters == ["z"] and list(model.peft_config) == ["z"]
    assert torch.equal(model(X), expected)
    model.base_model.copy_adapter("z", "y")
    train(model, "z", seed=9)
    model.set_adapter("y")
    assert torch.equal(model(X), expected)


# -- row 18: one matching rule ---


def test_row_18_a_string_and_a_list_mean_the_same() -> None:
    one = get_peft_model(lm(), config(target_modules="q_proj"))
    two = get_peft_model(lm(), config(target_modules=["q_proj"]))
    assert get_peft_model_state_dict(one).keys() == get_peft_model_state_dict(two).keys()


def test_row_18_the_error_lists_the_nearest_names() -> None:
    with pytest.raises(TargetError, match="q_proj"):
        get_peft_model(lm(), config(target_modules=["q_porj"]))


# -- row 20: saving ---


def test_row_20_saving_never_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = adapted(base_model_name_or_path="some-organisation/some-model")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "some-organisation/some-model"
    assert not [k for k, v in values.items() if v is None and k not in LoraConfig().to_json()]
    assert len(values) < 20


# -- row 22: unknown keys ---


def test_row_22_unknown_keys_count_only_with_a_value(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "use_future": False, "future_config": None}))
    PeftModel.from_pretrained(lm(), tmp_path)
    file.write_text(json.dumps({**values, "use_future": True}))
    with pytest.raises(UnknownOptionError, match="use_future"):
        PeftModel.from_pretrained(lm(), tmp_path)
    with pytest.raises(UnknownOptionError, match="use_future"):
        PeftConfig.from_pretrained(tmp_path)
