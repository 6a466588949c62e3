"""Tensors of one adapter in the place of another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.tolerances import assert_close
from tests.unit.net import IDS, Net, adapted
from veneer import LoraConfig, PeftModel, VeneerWarning, get_peft_model
from veneer.errors import AdapterNameError, ConfigError, LoadMismatchError, MergeError
from veneer.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


def in_memory(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_a_swapped_adapter_computes_what_the_other_one_does() -> None:
    model, other = adapted(seed=1), adapted(alpha=9, seed=2)
    parameters = {n: id(p) for n, p in model.named_parameters()}
    hotswap_adapter_from_state_dict(model, in_memory(other), "default", other.peft_config["default"])
    assert torch.equal(model(IDS), other(IDS))
    assert parameters == {n: id(p) for n, p in model.named_parameters()}, "in place"


def test_a_smaller_rank_is_filled_up_with_zeros() -> None:
    model, other = adapted(rank=4, seed=1), adapted(rank=2, alpha=9, seed=2)
    hotswap_adapter_from_state_dict(model, in_memory(other), "default", other.peft_config["default"])
    assert_close(model(IDS), other(IDS))


def test_what_cannot_be_swapped_is_refused_and_nothing_changes() -> None:
    model, bigger = adapted(rank=2), adapted(rank=4)
    before = in_memory(model)
    narrow = {name: t[:, :-1] if "lora_A" in name else t for name, t in before.items()}
    wrong = {
        "does not fit into": in_memory(bigger),
        # Smaller, but not along the rank: made for a narrower model.
        r"lora_A.default.weight is \(2, \d+\), which does not fit": narrow,
        "is missing": dict(list(before.items())[1:]),
        "the model has no": {**before, "base_model.model.third.lora_A.default.weight": torch.zeros(2, 6)},
    }
    for words, tensors in wrong.items():
        with pytest.raises(LoadMismatchError, match=words):
            hotswap_adapter_from_state_dict(model, tensors, "default", model.peft_config["default"])
    with pytest.raises(AdapterNameError, match="'nobody'"):
        hotswap_adapter_from_state_dict(model, before, "nobody", model.peft_config["default"])
    assert all(torch.equal(before[name], tensor) for name, tensor in in_memory(model).items())
    with pytest.raises(ConfigError, match="lora_bias: False and True"):
        check_hotswap_configs_compatible(LoraConfig(), LoraConfig(lora_bias=True))
    check_hotswap_configs_compatible(LoraConfig(r=2), LoraConfig(r=8, lora_alpha=3))


def test_swapping_from_a_directory(tmp_path: Any) -> None:
    model, other = adapted(seed=1), adapted(alpha=9, seed=2)
    other.save_pretrained(tmp_path)
    with pytest.raises(AdapterNameError, match="no adapter 'other' to swap; it has: 'default'"):
        hotswap_adapter(model, str(tmp_path), "other")
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(model(IDS), other(IDS))


@pytest.mark.parametrize("prepared", [False, True])
def test_what_was_swapped_in_is_what_is_saved(tmp_path: Path, prepared: bool) -> None:
    model, other = adapted(rank=4, seed=1), adapted(rank=2, alpha=9, seed=2, use_rslora=True)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    other.save_pretrained(tmp_path / "other")
    hotswap_adapter(model, str(tmp_path / "other"), "default")
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(Net(), tmp_path / "again").eval()
    assert torch.equal(again(IDS), model(IDS))
    assert_close(again(IDS), other(IDS))


VARIED: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"lora_bias": True, "target_modules": ["first"]},
    {"rank_pattern": {"first": 3}, "alpha_pattern": {"first": 7}},
]


@pytest.mark.parametrize("options", VARIED, ids=lambda o: next(iter(o), "plain"))
def test_preparing_changes_no_output_and_swapping_compiles_nothing_anew(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(rank=2, seed=1, **options)
    expected = model(IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert_close(model(IDS), expected)
    assert all(layer.r == {"default": 5} for layer in model.base_model.layers().values())
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(IDS)
        graphs = counter.frame_count
        for rank, alpha, seed in ((3, 9, 2), (5, 1, 3), (1, 4, 4)):
            patterns = {"rank_pattern": {}, "alpha_pattern": {}} if "rank_pattern" in options else {}
            other = adapted(rank=rank, alpha=alpha, seed=seed, **{**options, **patterns})
            other.save_pretrained(tmp_path / str(seed))
            hotswap_adapter(model, str(tmp_path / str(seed)), "default")
            assert_close(compiled(IDS), other(IDS))
    assert counter.frame_count == graphs


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_padded_group_by_group(groups: int) -> None:
    def made(rank: int, alpha: int, seed: int) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups))
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
        torch.manual_seed(seed)
        return get_peft_model(net, config)

    x = torch.randn(2, 4, 5, 5)
    model, other = made(2, 3, 1), made(4, 9, 2)
    expected = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert_close(model(x), expected)
    hotswap_adapter_from_state_dict(model, in_memory(other), "default", other.peft_config["default"])
    assert_close(model(x), other(x))


def test_configurations_kept_elsewhere_say_the_new_rank() -> None:
    model, mine = adapted(rank=2), LoraConfig(r=2, lora_alpha=5, use_rslora=True)
    prepare_model_for_compiled_hotswap(model, target_rank=4, config={"default": mine})
    assert (mine.r, mine.lora_alpha, mine.use_rslora) == (4, 4, False)
    assert model.peft_config["default"].r == 4


def test_what_cannot_be_prepared_is_refused() -> None:
    model = adapted(rank=4)
    with pytest.raises(ConfigError, match="check_compiled is 'error', 'warn' or 'ignore', got 'no'"):
        prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="no")
    started = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match="first: 'default' keeps its starting factors"):
        prepare_model_for_compiled_hotswap(started, target_rank=8)
    with pytest.raises(ConfigError, match="below the rank of 3 layers"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"), target_rank=8)
    with pytest.warns(VeneerWarning, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(
            torch.compile(model, backend="eager"), target_rank=8, check_compiled="warn"
        )
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.raises(AdapterNameError, match="no adapter"):
        prepare_model_for_compiled_hotswap(Net())
