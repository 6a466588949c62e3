"""Optional libraries: check that one is installed, and silence their bars and notices."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

from ..errors import Hint, MissingExtraError


def require(library: str, extra: str, purpose: str | Hint) -> None:
    """Raise `MissingExtraError`, with the command that installs it, where an optional library is missing."""
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(library, extra, purpose)


@contextlib.contextmanager
def quiet_libraries(downloads: bool = False) -> Iterator[None]:
    """Keep the bars and notices of transformers and datasets off the terminal; errors still come through.

    A library that is not imported yet stays so.

    Args:
        downloads: Let huggingface_hub show on a terminal what it downloads.
    """
    with contextlib.ExitStack() as restored:
        if "transformers" in sys.modules:
            from transformers.utils import logging

            restored.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                restored.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
                if downloads:
                    from huggingface_hub.utils import enable_progress_bars

                    enable_progress_bars()
        datasets = sys.modules.get("datasets")
        if datasets is not None and not datasets.are_progress_bars_disabled():
            restored.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield
