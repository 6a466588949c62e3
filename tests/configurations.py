"""Reading the configuration of a directory, as everything that loads an adapter does."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from veneer.errors import VeneerWarning
from veneer.files.layout import check_directory, find_config


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The values that belong to the tensors of a directory; warns where there is something to say."""
    found = find_config(check_directory(Path(directory)))
    if found.remark is not None:
        warnings.warn(found.remark, VeneerWarning, stacklevel=2)
    return found.values
