"""The file ``adapter_config.json``, as it comes from anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.config import values as check
from veneer.errors import AdapterFileError, ConfigError, Hint

CONFIG_FILE = "adapter_config.json"


LARGEST_FILE = 16 * 2**20


DEEPEST_NESTING = 32


def config_path(directory: Path, subfolder: str | None) -> Path:
    """The configuration file in a directory, or an error that says where one is."""
    path = (directory / subfolder if subfolder else directory) / CONFIG_FILE
    if path.is_file():
        return path
    if not directory.exists():
        raise AdapterFileError(
            f"{directory} does not exist; a local adapter is a directory with {CONFIG_FILE}"
        )
    if directory.is_file():
        raise AdapterFileError(f"{directory} is a file; pass the directory of the adapter instead")
    inside = sorted(p.parent.relative_to(directory).as_posix() for p in directory.glob(f"*/{CONFIG_FILE}"))
    if not inside:
        raise AdapterFileError(f"{path} is missing")
    way = [] if subfolder else [Hint("subfolder", inside[0], "; pass {}")]
    raise AdapterFileError(f"{path} is missing; sub-directories with one: {', '.join(inside[:10])}", *way)


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in an ``adapter_config.json``.

    Raises:
        AdapterFileError: If the file is missing, too large, not UTF-8, no JSON, or not an object.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise AdapterFileError(f"cannot read {name}: {error.strerror or error}") from error
    if len(raw) > LARGEST_FILE:
        raise AdapterFileError(
            f"{name} is larger than {LARGEST_FILE >> 20} MiB: not an adapter configuration"
        )
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        kind = (
            "nested too deeply"
            if isinstance(error, RecursionError)
            else f"not valid JSON ({check.show(str(error))})"
        )
        raise AdapterFileError(f"{name} is {kind}: truncated or damaged?") from error
    if not isinstance(values, dict):
        raise AdapterFileError(
            f"{name} holds a JSON {type(values).__name__}, not an object with the adapter's options"
        )
    return values


def check_nesting(values: Any) -> None:
    """Refuse what is nested deeper than any configuration is."""
    level = [values]
    for _ in range(DEEPEST_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, (Mapping, list, tuple))
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
    raise ConfigError(f"the configuration is nested more than {DEEPEST_NESTING} levels deep")
