"""A variant with parameters of its own needs its one file: everything else asks it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from veneer.adapters import AdapterSet
from veneer.config import support
from veneer.errors import ConfigError, LoadMismatchError
from veneer.layers import Factor, LoraLayer, wrap
from veneer.layers.start import start_from, tensor_shapes
from veneer.state_dict import set_adapter_state_dict
from veneer.variants import Branch, ParameterRequest, Variant, registry


@pytest.fixture(autouse=True)
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Variant]]:
    """``W' = W + g ⊙ s·BA + t``, of two parameters: a gate a row, and a number added to every element."""
    monkeypatch.setattr(registry, "_items", dict(registry._items))
    monkeypatch.setattr(support, "variants_of", lambda config: ["gated"] if config.use_qalora else [])
    monkeypatch.setattr("veneer.spec.variants_of", support.variants_of)

    class Gated(Variant):
        name = "gated"

        def options(self, config: LoraConfig) -> Mapping[str, Any]:
            return {"start": config.qalora_group_size}

        def shapes(self, request: ParameterRequest) -> Mapping[str, tuple[int, ...]]:
            return {"lora_gate": request.vector_shape, "lora_shift": (1,)}

        def parameters(self, request: ParameterRequest) -> Mapping[str, Tensor]:
            b, a = request.update()
            assert request.matrix().shape == (b.shape[0], a.shape[1])
            gate = torch.full(request.vector_shape, float(request.spec.variant_options["start"]))
            return {"lora_gate": gate, "lora_shift": torch.zeros(1)}

        def forward(
            self, layer: Branch, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]
        ) -> Tensor:
            extra = layer.extra(name)
            branch = layer.low_rank(name, layer.dropped(name, x)) * layer.scaling[name]
            added = x.sum(-1, keepdim=True) * extra["lora_shift"]
            return result + branch * layer.along_output(extra["lora_gate"]) + added

        def merged(self, weight: Tensor, delta: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
            return weight + delta * extra["lora_gate"].reshape(-1, 1) + extra["lora_shift"]

    yield Gated


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 5)
        self.v = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.relu(self.q(x)))


def config(**more: Any) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["q", "v"], "use_qalora": True}
    return LoraConfig(**options | {"qalora_group_size": 3} | more)


def model(**more: Any) -> PeftModel:
    torch.manual_seed(0)
    made = get_peft_model(Net(), config(**more))
    with torch.no_grad():
        for parameter in AdapterSet(made).parameters("default"):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return made


KEYS = {
    f"base_model.model.{path}.{name}"
    for path in ("q", "v")
    for name in ("lora_A.weight", "lora_B.weight", "lora_gate", "lora_shift")
}


def test_they_start_where_the_variant_says_and_lie_beside_the_factors() -> None:
    made = get_peft_model(Net(), config())
    layer = made.base_model.model.q
    assert torch.equal(layer.lora_gate["default"].weight, torch.full((5,), 3.0))
    assert "base_model.model.q.lora_gate.default.weight" in dict(made.named_parameters())
    assert all(p.requires_grad for p in layer.adapter_parameters("default"))
    assert len(list(layer.adapter_parameters("default"))) == 4
    assert layer.adapter_layer_names[-2:] == ("lora_gate", "lora_shift")
    assert isinstance(layer.lora_gate["default"], Factor)
    assert layer.specs["default"].variant_options == {"start": 3}


def test_saved_loaded_and_strictly_accounted_for(tmp_path: Path) -> None:
    made, x = model(), torch.randn(3, 6)
    state = get_peft_model_state_dict(made)
    assert set(state) == KEYS
    made.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    torch.manual_seed(0)
    empty = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True)
    for loaded in (again, empty):
        assert torch.equal(loaded(x), made(x))
        assert all(torch.equal(t, state[k]) for k, t in get_peft_model_state_dict(loaded).items())
    short = {k: v for k, v in state.items() if not k.endswith("q.lora_gate")}
    with pytest.raises(LoadMismatchError, match="lora_gate"):
        set_adapter_state_dict(again, short, "default", strict=True)


def test_absent_ones_start_anew_where_that_is_allowed(tmp_path: Path) -> None:
    made = model()
    state = get_peft_model_state_dict(made)
    layer = made.base_model.model.q
    own = {
        key.removeprefix("base_model.model.q."): value
        for key, value in state.items()
        if ".q." in key and "gate" not in key
    }
    spec = layer.specs["default"]
    start = start_from(layer, spec, own, tensor_shapes(layer, spec))
    assert torch.equal(start.extra["lora_gate"], torch.full((5,), 3.0))
    assert torch.equal(start.extra["lora_shift"], own["lora_shift"])


def test_written_in_place_by_the_state_dict() -> None:
    made, other = model(), model()
    doubled = {key: value * 2 for key, value in get_peft_model_state_dict(made).items()}
    set_peft_model_state_dict(other, doubled)
    assert all(torch.equal(v, doubled[k]) for k, v in get_peft_model_state_dict(other).items())


def test_copied_renamed_deleted() -> None:
    made, x = model(), torch.randn(3, 6)
    expected = made(x)
    layer: LoraLayer = made.base_model.model.q
    layer.copy_adapter("default", "twin")
    assert torch.equal(layer.extra("twin")["lora_gate"], layer.extra("default")["lora_gate"])
    assert layer.lora_gate["twin"].weight is not layer.lora_gate["default"].weight
    layer.delete_adapter("twin")
    made.rename_adapter("default", "other")
    assert list(layer.lora_gate) == ["other"]
    assert torch.equal(made(x), expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.extra("other")["lora_shift"], layer.extra("other")["lora_shift"])
    AdapterSet(made).delete("other")
    assert not [name for name in dict(made.named_modules()) if "lora_gate" in name]


def test_moved_with_the_layer() -> None:
    layer = model().base_model.model.q.to(torch.float64)
    assert layer.lora_gate["default"].weight.dtype == torch.float64


def test_merged_and_unmerged() -> None:
    made, x = model(), torch.randn(3, 6)
    expected, before = made(x), made.base_model.model.q.base_layer.weight.clone()
    made.merge_adapter()
    assert_close(made(x), expected)
    made.unmerge_adapter()
    assert torch.equal(made.base_model.model.q.base_layer.weight, before)


def test_trained() -> None:
    made, x = model(), torch.randn(3, 6)
    made(x).square().sum().backward()
    for parameter in AdapterSet(made).parameters("default"):
        assert parameter.grad is not None and parameter.grad.any()


def test_a_variant_that_contradicts_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variant: Any = registry.get("gated")
    monkeypatch.setattr(type(variant), "shapes", lambda self, request: {"lora_gate": (2,)})
    with pytest.raises(ConfigError, match="announced"):
        wrap(nn.Linear(3, 4), config())
