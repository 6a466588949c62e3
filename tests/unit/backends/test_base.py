"""Reading and writing base weights: dense ones, and those that accelerate keeps elsewhere."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

from veneer.backends import copied, find, stored_elsewhere
from veneer.errors import MergeError


def offloaded(folder: Path | None = None) -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    before = nn.Linear(3, 2)
    before.load_state_dict(model[0].state_dict())
    if folder is None:
        return accelerate.cpu_offload(model, execution_device="cpu"), before
    return accelerate.disk_offload(model, str(folder), execution_device="cpu"), before


def test_dense_reads_the_tensor_itself_and_writes_in_place() -> None:
    base = nn.Linear(3, 2)
    backend, parameter = find(base), base.weight
    assert backend.name == "dense" and backend.writable_in_place(base)
    assert backend.read(base).data_ptr() == parameter.data_ptr() and not backend.read(base).requires_grad
    backend.write(base, torch.ones(2, 3, dtype=torch.float64))
    assert base.weight is parameter and parameter.dtype == torch.float32 and bool((parameter == 1).all())
    backend.write(base, torch.zeros(2, 5))
    assert base.weight is not parameter and base.weight.shape == (2, 5) and base.weight.requires_grad
    backend.write(base, torch.ones(2), "bias")
    assert bool((base.bias == 1).all())
    assert backend.device(base) == torch.device("cpu") and backend.dtype(base) == torch.float32


@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_reads_and_writes_the_map_and_never_the_files(disk: bool, tmp_path: Path) -> None:
    model, before = offloaded(tmp_path if disk else None)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    base = model[0]
    backend = find(base)
    assert backend.name == "offloaded" and not backend.writable_in_place(base)
    assert torch.equal(backend.read(base), before.weight) and torch.equal(
        backend.read(base, "bias"), before.bias
    )
    backend.write(base, torch.ones(2, 3))
    assert base.weight.is_meta and bool((backend.read(base) == 1).all())
    x = torch.randn(4, 3)
    assert torch.allclose(model(x), x.sum(1, keepdim=True) + before.bias)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files
    assert backend.device(base) == torch.device("cpu") and backend.dtype(base) == torch.float32


def test_a_copy_of_an_offloaded_module_holds_its_own_values() -> None:
    model, before = offloaded()
    twin = copied(model)
    assert torch.equal(twin[0].weight, before.weight) and not hasattr(twin[0], "_hf_hook")
    x = torch.randn(4, 3)
    assert torch.equal(twin(x), before(x)) and torch.equal(model(x), before(x))
    with torch.no_grad():
        twin[0].weight.zero_()
    assert torch.equal(model(x), before(x))
    assert model[0].weight.is_meta


def test_values_that_are_kept_elsewhere_are_found_by_their_placeholders() -> None:
    model, before = offloaded()
    found = stored_elsewhere(model)
    assert torch.equal(found[id(model[0].weight)], before.weight) and len(found) == 2
    assert stored_elsewhere(before) == {}


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(MergeError, match="does not know"):
        find(nn.ReLU())
