"""Rows of an embedding that adapters train: two adapters' rows for one token never meet."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veneer import AdapterNameError, LoraConfig, MergeError, PeftModel, TargetError, get_peft_model
from veneer import merge as merging
from veneer.layers.trainable_tokens import TrainableTokens
from veneer.rollback import Rows
from veneer.routing import routed


class Net(nn.Module):
    """An embedding and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(6, 4), nn.Linear(4, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin(self.emb(ids))


def config(*tokens: int, target: str = "lin") -> LoraConfig:
    return LoraConfig(r=2, target_modules=[target], trainable_token_indices={"emb": list(tokens)})


def two() -> tuple[PeftModel, TrainableTokens]:
    model = get_peft_model(Net(), config(1))
    model.add_adapter("second", config(1, 2))
    return model, model.get_base_model().emb


def test_two_rows_for_one_token_are_neither_active_nor_merged_together() -> None:
    _, layer = two()
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(AdapterNameError, match="both train the row of token 1"):
        layer.set_adapter(["default", "second"])
    with pytest.raises(MergeError, match="both train the row of token 1"):
        layer.merge(adapter_names=["default", "second"])
    assert list(layer.active_adapters) == ["default"] and torch.equal(layer.get_base_layer().weight, before)


def test_rows_that_are_not_finite_are_not_merged_safely() -> None:
    model, layer = two()
    before = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.rows("default").fill_(float("nan"))
    for merge in (layer.merge, model.merge_adapter):
        with pytest.raises(MergeError, match="the rows of 'default' would be NaN or infinite"):
            merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


def test_an_embedding_is_adapted_in_one_way() -> None:
    with pytest.raises(TargetError, match=r"emb \(Embedding\): target_modules names it too"):
        get_peft_model(Net(), config(1, target="emb"))


def two_apart() -> tuple[TrainableTokens, Tensor]:
    model = get_peft_model(Net(), config(1, 4))
    model.add_adapter("second", config(2))
    layer = model.get_base_model().emb
    layer.set_adapter(["default", "second"])
    with torch.no_grad():
        for number, name in enumerate(("default", "second"), 1):
            layer.rows(name).fill_(float(number))
    return layer, layer.get_base_layer().weight.detach().clone()


def test_rows_are_merged_and_taken_out_adapter_by_adapter() -> None:
    layer, before = two_apart()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    weight = layer.get_base_layer().weight
    assert weight[[1, 4]].eq(1.0).all() and weight[2].eq(2.0).all()
    assert torch.equal(layer.original_base().weight, before)
    layer.rename_adapter("second", "other")
    with torch.no_grad():
        layer.rows("other").zero_()
    layer.unmerge(["default"])
    assert torch.equal(weight[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    assert weight[2].eq(2.0).all(), "what is merged stays as it was merged"
    layer.unmerge()
    assert torch.equal(weight, before) and not list(layer._undo or ())


def test_rows_that_are_merged_beside_others_are_put_back_if_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, before = two_apart()
    layer.merge(adapter_names=["default"])
    merged, write = layer.get_base_layer().weight.detach().clone(), merging._write

    def broken(layer: TrainableTokens, updates: list[Rows]) -> float:
        write(layer, updates)
        if any(update.rows.eq(2.0).all() for update in updates):
            raise RuntimeError("late")
        return 1.0

    monkeypatch.setattr(merging, "_write", broken)
    with pytest.raises(RuntimeError, match="late"):
        layer.merge()
    assert layer.merged_adapters == ["default"]
    assert torch.equal(layer.get_base_layer().weight, merged)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_merged_rows_are_copied_pickled_and_moved() -> None:
    layer, before = two_apart()
    layer.merge(adapter_names=["default"])
    ids = torch.arange(6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(ids), layer(ids))
        twin.unmerge()
        assert torch.equal(twin.get_base_layer().weight, before)


def test_rows_merged_on_one_device_are_kept_beside_rows_of_another() -> None:
    layer, _ = two_apart()
    layer.merge(adapter_names=["default"])
    layer.to("meta")
    with pytest.raises(MergeError, match="no values to merge into"):
        layer.merge(adapter_names=["second"])
    merging._keep(layer, layer._undo, [*layer._undo.updates.values(), layer.update_of("second")])
    assert layer._undo.tensors()["places"].device.type == "meta" and layer._undo.tensors()["rows"].shape == (
        3,
        4,
    )


def test_rows_of_an_offloaded_embedding_are_merged() -> None:
    module = nn.Embedding(6, 4)
    before = module.weight.detach().clone()
    holder = nn.Sequential(module)
    accelerate.cpu_offload(holder, execution_device=torch.device("cpu"))
    layer = TrainableTokens(module)
    layer.put_rows("a", layer.prepared([1, 2], torch.ones(2, 4)))
    layer.set_adapter("a")
    layer.merge()
    assert layer(torch.tensor([1, 2])).eq(1.0).all()
    layer.unmerge()
    assert torch.equal(layer.original_base()(torch.arange(6)), before)


class Copies(TorchDispatchMode):
    """Counts numbers in new tensors of floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.data_ptr() not in given:
            self.numbers += result.numel()
        return result


def test_rows_of_many_adapters_copy_the_output_as_often_as_those_of_two() -> None:
    model, layer = two()
    for name in ("third", "fourth"):
        model.add_adapter(name, config(1, 2))
    ids = torch.tensor([[1, 2, 3]]).expand(16, 3)
    found = []
    for names in (["default", "second"] * 8, ["default", "second", "third", "fourth"] * 4):
        with routed(layer, names), Copies() as forward:
            y = layer(ids)
        with Copies() as backward:
            y.sum().backward()
        found.append((forward.numbers, backward.numbers))
        for row, name in enumerate(names):
            assert torch.equal(y[row, 0], layer.rows(name)[0]), name
    (two_forward, two_backward), (four_forward, four_backward) = found
    rows = 8 * layer.rows("second").numel()  # what is made of the rows of each adapter, whatever the output
    assert four_forward <= two_forward + rows and four_backward <= two_backward + rows
