"""Optional libraries: whether one is there, and a while without their bars and notices."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

from ..errors import Hint, MissingExtraError


def require(library: str, extra: str, purpose: str | Hint) -> None:
    """Raise unless an optional library is installed.

    Raises:
        MissingExtraError: Names the line that installs it.
    """
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(library, extra, purpose)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the bars and notices of transformers and datasets off the terminal; errors still come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets = sys.modules.get("datasets")
    shown = datasets is not None and not datasets.are_progress_bars_disabled()
    if datasets is not None and shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if datasets is not None and shown:
            datasets.enable_progress_bars()
