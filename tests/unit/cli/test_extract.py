"""`veneer extract`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from veneer.cli import main

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with other matrices and norms."""
    place = Path(shutil.copytree(base, tmp_path_factory.mktemp("tuned") / "tuned"))
    tensors = {name: tensor * 1.5 for name, tensor in load_file(place / WEIGHTS).items()}
    save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    return place


def test_extract(base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["extract", "--base", str(base), "--tuned", str(tuned), "--rank", "2", "--output"]
    assert main([*words, str(tmp_path / "two")]) == 0
    shown = capsys.readouterr()
    assert "down_proj" in shown.out and "of the update is missed" in shown.out
    assert "saved whole: " in shown.out and f"{tmp_path / 'two'}" in shown.out
    assert "tensors " in shown.err
    assert main([*words, str(tmp_path / "json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(tmp_path / "json") and not found["left_out"]
    assert {module["rank"] for module in found["modules"].values()} == {2}
    assert main(["inspect", str(tmp_path / "two"), "--no-spectrum"]) == 0


@pytest.mark.parametrize("every", [False, True])
def test_what_is_left_out_is_named(
    every: bool, base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--energy", "0.5", "--factors-only", *(["--modules"] if every else [])]
    assert (
        main(["extract", "--base", str(base), "--tuned", str(tuned), "--output", str(tmp_path / "o"), *flags])
        == 0
    )
    out = capsys.readouterr().out
    assert "left out, " in out and ("more: only factors" in out) is not every
    assert "model.layers.0.input_layernorm.weight (" in out


def test_everything_wrong_is_said_before_anything_is_loaded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--base", str(tmp_path / "a"), "--tuned", str(tmp_path / "b"), "--output", str(tmp_path / "o")]
    assert main(["extract", *places, "--rank", "1", "--energy", "2"]) == 2
    err = capsys.readouterr().err
    assert "either --rank or --energy" in err and "--energy must be a share" in err
    assert main(["extract", *places, "--rank", "1"]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path / 'a'}" in err and f"{tmp_path / 'b'}" in err and "Traceback" not in err


def test_an_interrupted_extraction_writes_nothing(
    base: Path,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from veneer.tools import extracting

    def interrupted(*matrix: object, **sizes: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(extracting, "truncated_svd", interrupted)
    places = ["--base", str(base), "--tuned", str(tuned), "--output", str(tmp_path / "o")]
    assert main(["extract", *places, "--rank", "2"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n") and list(tmp_path.iterdir()) == []
