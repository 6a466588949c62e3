"""Where a model is read from and results are written to, checked without loading anything."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import pytest

from veneer import ConfigError, TrainingError, VeneerError
from veneer.training.options import RunOptions, from_mapping
from veneer.training.paths import (
    all_of,
    check_answer_file,
    check_model,
    check_not_a_source,
    check_output,
    check_run,
)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    for place, said in (
        (tmp_path / "gone", "it does not exist"),
        (tmp_path, r"it has no config\.json"),
        (tmp_path / "file.json", "it is a file"),
    ):
        with pytest.raises(TrainingError, match=said):
            check_model(place)
    check_model(tmp_path / "file.json", config_file=True)
    check_model("someone/something")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TrainingError, match="It contains an adapter: pass its base model"):
        check_model(tmp_path)


def test_a_merged_model_never_lands_on_what_it_is_made_of(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for place in (base, adapter):
        place.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(VeneerError, match="is what is to be merged"):
        check_not_a_source(base, str(base))
    with pytest.raises(VeneerError, match="merged model again"):
        check_not_a_source(adapter, "org/base")
    check_not_a_source(tmp_path / "new", str(base))


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VeneerError, match="is a file; the output must be a directory"):
        check_output(tmp_path / "file")
    with pytest.raises(VeneerError, match="cannot write to the directory"):
        check_output(tmp_path / "file" / "out")
    check_output(tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_answers_cannot_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.jsonl").write_text("")
    for place, words in (
        (tmp_path, "is a directory"),
        (tmp_path / "there.jsonl", "exists already; choose another file"),
        (tmp_path / "no" / "where.jsonl", "does not exist"),
    ):
        with pytest.raises(VeneerError, match=words):
            check_answer_file(place)
    check_answer_file(tmp_path / "new.jsonl")

    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(VeneerError, match="cannot write to the directory"):
        check_answer_file(tmp_path / "new.jsonl")


def test_one_error_for_everything_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("")
    options = RunOptions(
        model=str(tmp_path), data=str(data), eval_data=str(tmp_path / "gone.csv"), output=str(data)
    )
    with pytest.raises(VeneerError) as caught:
        check_run(options)
    no_model, no_data, a_file = str(caught.value).split("\n")
    assert "no model at" in no_model and "gone.csv" in no_data and "is a file" in a_file
    monkeypatch.setenv("RANK", "1")  # only the first process writes
    with pytest.raises(VeneerError) as caught:
        check_run(options)
    assert len(str(caught.value).split("\n")) == 2
    with pytest.raises(TrainingError, match="no model at"):
        all_of([partial(check_model, tmp_path), partial(check_output, tmp_path)])
    with pytest.raises(ConfigError, match=r"x: unknown option 'a'.*\ny: unknown option 'b'"):
        all_of([partial(from_mapping, {"a": 1}, "x"), partial(from_mapping, {"b": 1}, "y")])
