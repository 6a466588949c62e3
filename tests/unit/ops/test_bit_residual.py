"""The bits of a 16-bit tensor from those of another and what tells them apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.ops.bit_residual import DTYPES, applied, between, checksum


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_bits_comes_back(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    for shift in (0, 1, 127, 128, 255, 256, 32768, 65535):
        new = bits(every).roll(shift).view(dtype)
        assert torch.equal(bits(applied(new, between(every, new))), bits(every))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(), (0,), (3,), (5, 7), (2, 3, 4)])
def test_shapes(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    old, new = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    again = applied(new, between(old, new))
    assert again.shape == old.shape and again.dtype == dtype
    assert torch.equal(again, old)


def test_strides_do_not_matter() -> None:
    old, new = torch.randn(6, 8).bfloat16().t(), torch.randn(8, 6).bfloat16()
    assert torch.equal(applied(new, between(old, new)), old)
    assert torch.equal(applied(old, between(new, old)), new)
    assert checksum(old) == checksum(old.contiguous())


def test_a_small_change_takes_about_a_byte() -> None:
    old = torch.randn(400, 300).bfloat16()
    new = (old.float() * 1.01).bfloat16()
    residual = between(old, new)
    assert residual.nbytes == old.numel() + 5 * residual.places.numel()
    assert residual.places.numel() < old.numel() / 1000


def test_what_does_not_fit_a_byte_is_listed_with_its_place() -> None:
    old, new = torch.tensor([1.0, 2.0, 3.0]).bfloat16(), torch.tensor([1.0, -2.0, 3.0]).bfloat16()
    residual = between(old, new)
    assert residual.places.tolist() == [1] and residual.low.tolist() == [0, 0, 0]
    assert torch.equal(applied(new, residual), old)


@pytest.mark.parametrize("size", [1, 4, 7, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_sees_every_single_change(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size).to(dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        bits(changed)[place] ^= 1
        assert checksum(changed) != before
