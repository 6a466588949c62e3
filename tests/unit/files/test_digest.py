from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from veneer.files.digest import data_digest

FIRST, BLOCK = 16, 4096


def digest(data: bytes, place: Path) -> str:
    place.write_bytes(bytes(FIRST) + data)
    return data_digest(torch.UntypedStorage.from_file(str(place), False, FIRST + len(data)), FIRST)


@pytest.mark.parametrize("length", [0, 5, BLOCK, 3 * BLOCK + 100])
def test_it_is_of_the_data_alone(length: int, tmp_path: Path) -> None:
    data, other = random.Random(1).randbytes(length), random.Random(2).randbytes(length)
    assert digest(data, tmp_path / "a") == digest(data, tmp_path / "b")
    assert (digest(data, tmp_path / "a") == digest(other, tmp_path / "b")) == (length == 0)


def test_every_bit_counts_and_so_does_the_order(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 * BLOCK + 100)
    saved, others = digest(data, tmp_path / "a"), []
    for bit in range(0, 8 * len(data), 397):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        others.append(digest(bytes(flipped), tmp_path / "a"))
    others.append(digest(data[BLOCK : 2 * BLOCK] + data[:BLOCK] + data[2 * BLOCK :], tmp_path / "a"))
    assert saved not in others
