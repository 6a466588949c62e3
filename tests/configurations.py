"""Reading the configuration of a directory, as everything that loads an adapter does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from veneer import LoraConfig
from veneer.files.layout import find_config


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The values that belong to the tensors of a directory; warns where there is something to say."""
    found = find_config(Path(directory))
    LoraConfig.from_belonging(found)
    return found.values
