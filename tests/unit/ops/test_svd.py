"""Truncated decompositions against dense ones, below and above the size where a Krylov space takes over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import OPS_SPECTRUM, assert_close
from veneer.ops import svd

SHAPES = [(12, 20), (20, 12), (80, 60), (60, 80)]


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Krylov space from 32 rows and columns on, so that the matrices of the tests are small."""
    for name, value in {"_DENSE_UP_TO": 32, "_FIRST_GUESS": 2, "_BESIDE": 2, "_BLOCK_SHARE": 1 / 4}.items():
        monkeypatch.setattr(svd, name, value)


@pytest.fixture
def krylov(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is used."""
    monkeypatch.delattr(svd, "_gram")


def matrix(shape: tuple[int, int], falling: float) -> Tensor:
    side = min(shape)
    u, v = (torch.linalg.qr(torch.randn(size, side)).Q for size in shape)
    return u * falling ** torch.arange(side) @ v.T


@pytest.mark.parametrize("shape", SHAPES)
def test_so_many_of_the_largest(shape: tuple[int, int]) -> None:
    m = matrix(shape, 0.5)
    u, s, vh = svd.truncated_svd(m, 4)
    whole = torch.linalg.svd(m, full_matrices=False)
    assert_close(s, whole.S[:4], OPS_SPECTRUM)
    assert_close(u * s @ vh, whole.U[:, :4] * whole.S[:4] @ whole.Vh[:4], OPS_SPECTRUM)
    assert len(svd.truncated_svd(m, 99)[1]) == min(shape)


@pytest.mark.usefixtures("krylov")
@pytest.mark.parametrize("falling", [0.5, 0.9, 0.999])
def test_the_error_is_less_than_a_thousandth_above_the_smallest_one(falling: float) -> None:
    m = matrix((400, 300), falling)
    u, s, vh = svd.truncated_svd(m, 8)
    best = float(torch.linalg.svdvals(m)[8:].norm())
    assert best - OPS_SPECTRUM.atol <= float((m - u * s @ vh).norm()) <= 1.001 * best + OPS_SPECTRUM.atol


@pytest.mark.usefixtures("krylov")
@pytest.mark.parametrize("size", [{"rank": 8}, {"energy": 1 - 1e-5}])
def test_a_matrix_of_low_rank(size: dict[str, float]) -> None:
    """What is left of a block is rounding then, and no new direction."""
    m = torch.randn(80, 3) @ torch.randn(3, 60)
    u, s, vh = svd.truncated_svd(m, **size)
    assert len(s) == size.get("rank", 3)
    assert_close(u * s @ vh, m, OPS_SPECTRUM)
    assert_close(s[3:], torch.zeros(len(s) - 3), OPS_SPECTRUM)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("falling", [0.3, 0.9])
@pytest.mark.parametrize("energy", [0.5, 0.999])
def test_as_many_as_an_energy_takes(shape: tuple[int, int], falling: float, energy: float) -> None:
    m = matrix(shape, falling)
    u, s, vh = svd.truncated_svd(m, energy=energy)
    squares = torch.linalg.svdvals(m).double().square()
    least = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
    assert len(s) in (least, least + 1)
    assert float((m - u * s @ vh).norm() / m.norm()) <= (1 - energy) ** 0.5 + OPS_SPECTRUM.atol


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_takes_one(shape: tuple[int, int]) -> None:
    _, s, _ = svd.truncated_svd(torch.zeros(shape), energy=0.9)
    assert s.tolist() == [0.0]
