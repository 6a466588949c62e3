"""Values and texts that readers tend to fall over."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e-50, 1e39, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "q_proj", "model", "layers", "embed_tokens",
    "all-linear", "(", "[", ".*", r".*\.k_proj", "(a+)+!", "([a-z0-9._]+)+!", "\ud800", "\0", "a\0b", "..",
    "../x", "/", "x" * 300, "y" * 100_000, "é\u202e", "[red]", "{0}", "%s", "LORA", "CAUSAL_LM", "eva",
    "pissa", "float32", "some/where", "-1", "1e-4", "true", [], {}, [[]], [None], {"": None},
]  # fmt: skip
#: Bytes that are no UTF-8, or mean something to whoever does not expect them.
STRANGE = (
    b"\xff\xfe",
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r",
    b"\x1b[31m",
    b"\xe2\x80\xa8",
)


def odd(random: Random, depth: int = 0) -> Any:
    """A value of any type, mostly one of `ODD`."""
    kind = random.random()
    if kind < 0.7 or depth > 2:
        return copy.deepcopy(random.choice(ODD))
    if kind < 0.8:
        return random.choice(
            [random.randint(-(2**70), 2**70), random.uniform(-1e3, 1e3), random.randint(0, 9)]
        )
    inner = [odd(random, depth + 1) for _ in range(random.randint(0, 3))]
    if kind < 0.9:
        return inner
    return {str(random.choice(ODD))[:300]: value for value in inner}


def spoiled(value: Any, random: Random) -> Any:
    """A copy of a value of JSON with something else at one place or a few."""
    tree = [copy.deepcopy(value)]
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        holder, key = random.choice(places)
        old = holder[key]
        act = random.randrange(6)
        if act == 0 and holder is not tree:
            del holder[key]
        elif act == 1:
            holder[key] = [old]
        elif act == 2 and isinstance(old, dict):
            old[random.choice(("", "r", "x" * 2000, "use_future", "\0", str(odd(random))[:50]))] = odd(random)
        elif act == 3 and isinstance(old, int | float):
            holder[key] = random.choice(
                (str(old), float(old) if abs(old) < 1e300 else old, -old, old + 1, old * 10**9)
            )
        elif act == 4 and isinstance(old, list):
            old.append(odd(random))
        else:
            holder[key] = odd(random)
    return tree[0]


def _places(holder: Any) -> Any:
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


def spoiled_bytes(raw: bytes, random: Random) -> bytes:
    """Bytes that are cut, flipped, doubled, or have strange ones among them."""
    data = bytearray(raw)
    act = random.randrange(8)
    at = random.randrange(len(data) + 1)
    if act == 0:
        return bytes(data[:at])
    if act == 1:
        for _ in range(random.choice((1, 1, 3, 50))):
            if data:
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(data)
    if act == 2:
        data[at:at] = random.choice(STRANGE)
        return bytes(data)
    if act == 3:
        end = min(len(data), at + random.randint(1, 64))
        return bytes(data[:at] + data[end:])
    if act == 4:
        data[at : at + 8] = random.randbytes(8)
        return bytes(data)
    if act == 5:
        return bytes(data) + random.choice((b"x", b"\0" * 100, bytes(data)))
    if act == 6:
        return random.choice(
            (b"", b" ", b"\0" * 64, random.randbytes(random.randint(1, 500)), b"version https://git-lfs")
        )
    return bytes(data[at:])


def spoiled_json(value: Any, random: Random) -> bytes:
    """A document of JSON with other values in it, or of texts that are none."""
    text = json.dumps(value, indent=random.choice((None, 2)))
    act = random.randrange(12)
    if act < 6:
        return json.dumps(spoiled(value, random)).encode()
    if act < 8:
        return spoiled_bytes(text.encode(), random)
    if act == 8 and isinstance(value, dict) and value:  # a key twice
        key = random.choice(sorted(value))
        return text.replace("{", "{" + json.dumps(key) + ": " + json.dumps(odd(random)) + ", ", 1).encode()
    if act == 9:
        return text.encode(random.choice(("utf-16", "utf-8-sig", "utf-32", "utf-7")))
    if act == 10:
        deep = random.choice((500, 100_000))
        return random.choice(("[" * deep, '{"r":' * deep, "[" * deep + "]" * deep)).encode()
    number = random.choice(("1e999", "-1e999", "1" * 5000, "0." + "0" * 5000 + "1", "NaN", "01", "1_0"))
    return text.replace(": ", f': {number}, "r": ', 1).encode()
