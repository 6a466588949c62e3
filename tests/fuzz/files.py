"""Files in pieces, and what a careless reader would run: what tests of hostile files are made of."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(file: Path, header: object, body: bytes) -> None:
    """Write a safetensors file of any header, given as bytes or as what to write as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


class Bomb:
    """What runs when it is unpickled by a careless reader: a file `exploded` where the program runs."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (Path("exploded"),))
