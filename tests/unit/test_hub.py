"""Where an adapter lies, and the keywords that come along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from veneer import PeftConfig
from veneer.errors import AdapterFileError, UnknownOptionError
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


@pytest.mark.parametrize("load", [adapter_directory, PeftConfig.from_pretrained])
def test_an_unreachable_hub_is_asked_once(load: Callable[[str], object], unreachable_hub: str) -> None:
    with pytest.raises(AdapterFileError, match=f"the hub at {unreachable_hub} does not answer.*HF_ENDPOINT"):
        load("nobody/nothing")


def test_a_token_without_the_right_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    refusal = HfHubHTTPError("Forbidden", response=SimpleNamespace(status_code=403, headers={}, request=None))

    def refuse(*args: object, **kwargs: object) -> str:
        raise refusal

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(AdapterFileError, match=r"the hub refuses .* \(status 403\): the token is invalid"):
        adapter_directory("team/adapter", token="hf_read_only")
