"""Where an adapter lies, and the keywords that come along."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.errors import UnknownOptionError
from veneer.hub import HUB_OPTIONS, adapter_directory


def test_a_local_path_takes_the_keywords_of_the_hub(tmp_path: Path) -> None:
    options = dict.fromkeys(sorted(HUB_OPTIONS - {"subfolder"}))
    assert adapter_directory(tmp_path, subfolder="a", **options) == tmp_path / "a"


def test_misspelt_keywords_are_all_named_with_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(UnknownOptionError) as raised:
        adapter_directory(tmp_path, revison="main", zzz=1, token=None)
    assert "'revison' (did you mean 'revision'?)" in str(raised.value)
    assert "'zzz'" in str(raised.value) and "'token'" not in str(raised.value)
    assert isinstance(raised.value, TypeError)


def test_a_repository_id_is_not_asked_for_with_misspelt_keywords() -> None:
    with pytest.raises(UnknownOptionError, match="did you mean 'local_files_only'"):
        adapter_directory("org/name", local_file_only=True)
