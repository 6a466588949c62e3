"""NaN, infinity and types that no factor has are refused wherever an adapter is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from veneer import (
    AdapterFileError,
    LoraConfig,
    PeftModel,
    VeneerWarning,
    get_peft_model,
    set_peft_model_state_dict,
)
from veneer.files.values import check_values
from veneer.hotswap import hotswap_adapter
from veneer.training.merge_files import merge_files

KEY = "base_model.model.up.lora_A.weight"


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 4, bias=False)


def adapted() -> Any:
    return get_peft_model(Base(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))


def by_load_adapter(place: Path, model: Any) -> None:
    model.load_adapter(place, "another")


def by_loading_into_it(place: Path, model: Any) -> None:
    model.load_adapter(place, "default")


def by_hotswap(place: Path, model: Any) -> None:
    hotswap_adapter(model, str(place), "default")


def by_state_dict(place: Path, model: Any) -> None:
    set_peft_model_state_dict(model, load_file(place / "adapter_model.safetensors"))


def by_merging_files(place: Path, model: Any) -> None:
    base = place.parent / "base"
    base.mkdir()
    save_file({"up.weight": model.base_model.model.up.weight.detach().clone()}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    try:
        merge_files(place, base, place.parent / "merged")
    finally:
        assert not (place.parent / "merged").exists()


DOORS: list[Callable[[Path, Any], None]] = [
    by_load_adapter,
    by_loading_into_it,
    by_hotswap,
    by_state_dict,
    by_merging_files,
]
DAMAGE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": (lambda t: t.index_fill(1, torch.tensor([2]), float("nan")), "hold NaN or infinity"),
    "inf": (lambda t: (t * 0 - float("inf")).to(torch.bfloat16), "hold NaN or infinity"),
    "int": (lambda t: t.to(torch.int32), r"are no factors.*\(int32\)"),
    "bool": (lambda t: t > 0, r"are no factors.*\(bool\)"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), r"are no factors.*\(float8_e4m3fn\)"),
}


def damaged(place: Path, kind: str) -> Path:
    adapted().save_pretrained(place)
    tensors = load_file(place / "adapter_model.safetensors")
    save_file({**tensors, KEY: DAMAGE[kind][0](tensors[KEY])}, place / "adapter_model.safetensors")
    return place


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_refuses_and_the_model_is_as_it_was(
    tmp_path: Path, door: Callable[[Path, Any], None], kind: str
) -> None:
    place, model = damaged(tmp_path / "adapter", kind), adapted()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(AdapterFileError, match=f"1 of 2 tensors {DAMAGE[kind][1]}") as caught:
        door(place, model)
    assert "up.lora_A" in str(caught.value)
    offers = kind in ("nan", "inf") and door not in (
        by_hotswap,
        by_merging_files,
    )  # these have no such option
    assert ("check_finite" in str(caught.value)) is offers
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[n] is t and torch.equal(t, copy) for n, (t, copy) in before.items())


def test_a_fresh_model_is_as_it_was_too(tmp_path: Path) -> None:
    base = Base()
    with pytest.raises(
        AdapterFileError, match=r"hold NaN or infinity: .*check_finite=False loads it all the same"
    ):
        PeftModel.from_pretrained(base, damaged(tmp_path, "nan"))
    assert type(base.up) is nn.Linear


def test_who_wants_nan_gets_it_with_a_warning(tmp_path: Path) -> None:
    place = damaged(tmp_path, "nan")
    with pytest.warns(VeneerWarning, match="hold NaN or infinity: .*up.lora_A"):
        model = PeftModel.from_pretrained(Base(), place, check_finite=False)
    with pytest.warns(VeneerWarning, match="hold NaN or infinity"):
        model.load_adapter(place, "another", check_finite=False)
    with pytest.warns(VeneerWarning, match="hold NaN or infinity"):
        set_peft_model_state_dict(model, load_file(place / "adapter_model.safetensors"), check_finite=False)
    assert model.base_model.model.up.lora_A["another"].weight.isnan().sum() == 2


def test_what_is_no_factor_may_count_and_be_empty() -> None:
    check_values(
        {
            "norm.num_batches_tracked": torch.tensor(3),
            "m.weight": torch.ones(2).to(torch.float8_e5m2),
            "empty.lora_A.weight": torch.ones(0, 4),
            "m.lora_B.weight": torch.full((2, 2), torch.finfo(torch.float32).max),
            "meta.lora_A.weight": torch.ones(2, 2, device="meta"),
        },
        "here",
    )


def test_the_check_copies_no_tensor() -> None:
    made: list[int] = []
    tensor = torch.ones(64, 64).t()
    with _Watch(made):
        check_values({KEY: tensor}, "here")
    assert max(made) == 1


class _Watch(TorchDispatchMode):
    """Notes the size of every tensor that is made."""

    def __init__(self, made: list[int]) -> None:
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        if "detach" not in str(func):
            self.made += [t.numel() for t in results if isinstance(t, torch.Tensor)]
        return result
