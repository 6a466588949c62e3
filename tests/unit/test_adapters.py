"""The index over the modules of a model, and names."""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path

import pytest
import torch
from torch import nn

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.adapters import AdapterSet, as_names, begin, check_adapter_name, walk
from veneer.errors import AdapterNameError, VeneerError
from veneer.routing import disabled


def model(**more: object) -> nn.Module:
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    result = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **more), "a")
    result.add_adapter("b", LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    return result


@pytest.mark.parametrize(
    "name", ["", "a.b", "a/b", "a\\b", "..", "keys", "items", "training", "forward", "base_layer"]
)
def test_names_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(AdapterNameError):
        check_adapter_name(name)


@pytest.mark.parametrize("name", ["default", "übung", "a b", "1", "A-b_c", "None"])
def test_names_that_can_be_work_everywhere(name: str) -> None:
    check_adapter_name(name)
    made = model()
    made.add_adapter(name, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    made.set_adapter(name)
    assert made(torch.ones(3)).shape == (3,)
    made.base_model.rename_adapter(name, "other")
    assert made.active_adapters == ["other"]


def test_no_name_that_is_no_string() -> None:
    with pytest.raises(AdapterNameError):
        check_adapter_name(3)  # type: ignore[arg-type]


def test_as_names() -> None:
    assert as_names("a") == ["a"] and as_names(("b", "a", "b")) == ["b", "a"] and as_names([]) == []


def test_the_index_finds_modules_names_and_parameters() -> None:
    made = model(modules_to_save=["2"])
    index = AdapterSet(made)
    assert index.names() == ["a", "b"] and index.active() == ["a"]
    assert len(index.modules()) == 3
    assert sum(p.numel() for p in index.parameters("a")) == 12 + 6
    assert sum(p.numel() for p in index.parameters("b")) == 24


def irregular(index: AdapterSet) -> bool:
    """Whether modules disagree about what is active or enabled."""
    return len({(tuple(m.active_adapters), m.disable_adapters) for m in index.modules()}) > 1


def test_disagreement_between_layers_is_legal() -> None:
    made = model()
    index = AdapterSet(made)
    assert not irregular(index)
    made.base_model.model[0].set_adapter("b")
    assert irregular(index) and index.active() == ["b", "a"]
    index.activate("a")
    made.base_model.model[1].enable_adapters(False)
    assert irregular(index)
    with disabled(made):
        assert not irregular(index)
    assert made.base_model.model[1].disable_adapters and not made.base_model.model[0].disable_adapters


def test_disabled_is_left_after_an_error_too() -> None:
    made = model()
    index = AdapterSet(made)
    with pytest.raises(RuntimeError), disabled(made):
        raise RuntimeError
    assert not any(m.disable_adapters for m in index.modules())


def test_only_active_adapters_are_trainable() -> None:
    made = model()
    index = AdapterSet(made)
    for names in (["a"], ["b"], ["a", "b"], []):
        index.activate(names)
        for name in ("a", "b"):
            assert all(p.requires_grad == (name in names) for p in index.parameters(name))
    index.activate(["a"], inference_mode=True)
    assert not any(p.requires_grad for p in made.parameters())


def test_unknown_and_taken_names_are_refused_with_what_exists() -> None:
    index = AdapterSet(model())
    with pytest.raises(AdapterNameError, match=r"'x'.*'a', 'b'"):
        index.check(["a", "x"])
    with pytest.raises(AdapterNameError, match="already exists"):
        index.rename("a", "b")
    assert index.names() == ["a", "b"]


def test_what_cannot_be_active_together_changes_nothing() -> None:
    made = model(modules_to_save=["2"])
    made.add_adapter("c", LoraConfig(r=2, lora_alpha=6, target_modules=["0"], modules_to_save=["2"]))
    with pytest.raises(VeneerError, match="own copy"):
        made.set_adapter(["a", "c"])
    assert AdapterSet(made).active() == ["a"] and not irregular(AdapterSet(made))


def test_a_walk_passes_by_what_adapters_hold() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    net.append(net[0])
    names = [(path, type(m).__name__) for path, m in walk(net)]
    assert names == [(path, type(m).__name__) for path, m in net.named_modules()]
    model = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    model.add_adapter("second", LoraConfig(target_modules=["0"]))
    assert [path for path, _ in walk(net)] == [
        "", "0", "0.base_layer", "1", "1.original_module", "1.original_module.0", "1.original_module.1",
    ]  # fmt: skip


def test_loading_one_more_adapter_costs_what_the_first_ones_did(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))

    config = LoraConfig(r=2, target_modules=[str(i) for i in range(8)])
    get_peft_model(base(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path)

    def calls(name: str) -> int:
        profile = cProfile.Profile()
        profile.enable()
        model.load_adapter(tmp_path, name)
        profile.disable()
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    calls("warm")
    second = calls("second")
    for number in range(47):
        model.load_adapter(tmp_path, f"more{number}")
    assert calls("fiftieth") <= 1.02 * second


def test_a_module_begins_as_torch_lets_it_begin() -> None:
    made = nn.Module.__new__(nn.Module)
    begin(made)
    theirs = vars(nn.Module())
    assert vars(made) == theirs
    assert [type(value) for value in vars(made).values()] == [type(value) for value in theirs.values()]
    other = nn.Module.__new__(nn.Module)
    begin(other)
    other.register_buffer("mine", torch.zeros(1), persistent=False)
    assert vars(made) == theirs == vars(nn.Module())
