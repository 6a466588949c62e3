"""Rotary embeddings in a model's ``config.json``, under the names that transformers 4 gave them too.

transformers 5 writes ``rope_parameters`` alone. Other readers look for ``rope_theta`` and ``rope_scaling`` at
the top level, and silently use their own defaults if these are missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import atomic_file

NAME = "config.json"


def older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``rope_parameters`` say and the top level of a configuration lacks, by the older names."""
    given = config.get("rope_parameters")
    if not isinstance(given, dict) or "rope_theta" not in given:
        return {}  # none, or one for each type of layer, which has no older name
    found: dict[str, Any] = {"rope_theta": given["rope_theta"]}
    if given.get("rope_type", "default") != "default":
        found["rope_scaling"] = given
    return {name: value for name, value in found.items() if config.get(name) is None}


def write_older_names(directory: Path) -> None:
    """Add them to the ``config.json`` of a model's directory; to transformers it says the same."""
    path = directory / NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    if added := older_names(config):
        with atomic_file(path) as new:
            text = json.dumps({**config, **added}, indent=2, sort_keys=True)
            new.write_text(text + "\n", encoding="utf-8")
