"""Optional libraries: what is said where one is missing."""

from __future__ import annotations

import pytest

from veneer import MissingExtraError
from veneer.training.libraries import quiet_libraries, require


def test_a_missing_library_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'veneer\[train\]'"):
        require("a_library_that_nobody_has", "train", "reading a GGUF file")


def test_notices_are_off_for_a_while() -> None:
    import datasets
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    with quiet_libraries():
        assert datasets.are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
    after = logging.get_verbosity(), logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    assert after == before


def test_downloads_are_shown_where_somebody_looks() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    logging.enable_progress_bar()  # the hub's too
    for downloads in (True, False):
        with quiet_libraries(downloads):
            assert are_progress_bars_disabled() == (not downloads)
        assert not are_progress_bars_disabled()
