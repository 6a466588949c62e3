"""Reading ``adapter_config.json``, which is not trusted."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from typing import Any

from veneer.errors import AdapterFileError, short, show

LARGEST_FILE = 16 * 2**20


def read_config_bytes(path: str | os.PathLike[str]) -> bytes:
    """The raw content of an ``adapter_config.json``.

    Raises:
        AdapterFileError: If the file is missing or too large, or a pipe, from which nothing may ever come.
    """
    name = os.fspath(path)
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, not a file")
        with open(path, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise AdapterFileError(f"cannot read {short(name)}: {reason}") from error
    if len(raw) > LARGEST_FILE:
        raise AdapterFileError(
            f"{name} is larger than {LARGEST_FILE >> 20} MiB: not an adapter configuration"
        )
    return raw


def parse_config(raw: bytes, name: str) -> dict[str, Any]:
    """The JSON object that an ``adapter_config.json`` holds.

    Args:
        raw: Its content.
        name: What to call it in messages.

    Raises:
        AdapterFileError: If it is not UTF-8, no JSON, not an object, or has a key twice.
    """
    try:
        values = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        kind = (
            "nested too deeply"
            if isinstance(error, RecursionError)
            else f"not valid JSON ({show(str(error))})"
        )
        raise AdapterFileError(f"{name} is {kind}: truncated or damaged?") from error
    if not isinstance(values, dict):
        raise AdapterFileError(
            f"{name} holds a JSON {type(values).__name__}, not an object with the adapter's options"
        )
    return values


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary, for ``object_pairs_hook``; refuses a key that occurs twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:100]!r} occurs twice")
    return table


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in an ``adapter_config.json``, regardless of the tensors beside it.

    Raises:
        AdapterFileError: If the file is missing, too large, not UTF-8, no JSON, not an object, or has a key
            twice.
    """
    return parse_config(read_config_bytes(path), os.fspath(path))
