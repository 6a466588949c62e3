"""Row norms from low-rank algebra against dense ones, and what tells that a tensor has not changed."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import assert_close
from veneer.ops.row_norms import State, squared_row_norms, updated_row_norms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7, 3), (3, 2, 8), (1, 1, 1), (0, 4, 2)])
def test_they_are_those_of_the_dense_sum(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    out, size, r = shape
    weight = torch.randn(out, size).to(dtype)
    b, a = torch.randn(out, r) * 0.3, torch.randn(r, size) * 0.3
    norms = updated_row_norms(squared_row_norms(weight), weight, b, a, 1.5)
    expected = (weight.double() + 1.5 * b.double() @ a.double()).norm(dim=1)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(norms.to(dtype), expected.to(dtype))


def test_a_row_that_the_update_takes_away_has_no_negative_square() -> None:
    a = torch.randn(2, 6)
    b = torch.randn(4, 2)
    weight = -(b @ a)
    assert not updated_row_norms(squared_row_norms(weight), weight, b, a, 1.0).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("left", [1e-4, 1e-3, 1e-2, 0.1, 0.3])
def test_a_row_that_the_update_nearly_cancels(dtype: torch.dtype, left: float) -> None:
    weight = torch.randn(5, 64).to(dtype)
    b, a = torch.zeros(5, 2), torch.randn(2, 64)
    a[0], b[3, 0] = weight[3].float() * (left - 1.0), 1 / 1.5
    norms = updated_row_norms(squared_row_norms(weight), weight, b, a, 1.5)
    expected = (weight.double() + 1.5 * b.double() @ a.double()).norm(dim=1)
    assert_close((norms / expected).to(dtype), torch.ones(5, dtype=dtype))


def test_transposed_storage() -> None:
    weight, b, a = torch.randn(6, 4).T, torch.randn(4, 2), torch.randn(2, 6)
    norms = updated_row_norms(squared_row_norms(weight), weight, b, a, -0.5)
    assert_close(norms, (weight - 0.5 * b @ a).norm(dim=1))


def test_a_state_changes_with_the_tensor() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    state = State.of(parameter, None)
    assert state == State.of(parameter.detach()) and state is not None
    with torch.no_grad():
        parameter.add_(1.0)
    assert state != State.of(parameter)
    state = State.of(parameter)
    parameter.data = parameter.data.clone()
    assert state != State.of(parameter)
    assert State.of(parameter) != State.of(parameter.view(3, 2)) != State.of(parameter.T)


def test_memory_that_is_used_again_is_told_apart() -> None:
    for _ in range(20):
        tensor = torch.ones(1000)
        state = State.of(tensor)
        del tensor
        assert state != State.of(torch.ones(1000))


def test_tensors_whose_changes_cannot_be_seen_have_none() -> None:
    with torch.inference_mode():
        tensor = torch.ones(2)
    assert State.of(tensor) is None
    assert State.of(torch.ones(2, device="meta")) is None
