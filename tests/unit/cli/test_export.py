"""`veneer export`: what a user sees, and what stays on the disk when something is wrong."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import tests.readers.llama_cpp
import tests.readers.mlx
import tests.readers.vllm
from tests.unit.training.tiny import tiny_model
from veneer.cli import main
from veneer.integrations.export.vllm import Vllm


def test_export(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapter), str(tmp_path / "out"), "--target", "vllm"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"14 modules for vLLM, --lora-modules and LoRARequest: {tmp_path / 'out'}" in captured.out
    assert "adapter_model.safetensors (" in captured.out
    assert "read back: every update equals that of the adapter exactly" in captured.out
    assert "use it: python -m vllm" in captured.out and "--max-lora-rank 8" in captured.out
    assert len(tests.readers.vllm.read(tmp_path / "out")) == 14


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "mlx"])
def test_the_suggested_command_is_one_that_a_shell_can_be_given(
    target: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "org/base; rm -rf ~ #"
    place = shutil.copytree(adapter, tmp_path / "an adapter")
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    assert main(["export", str(place), "--target", target]) == 0
    words = shlex.split(capsys.readouterr().out.rpartition("use it: ")[2], comments=True)
    assert name in words and any(word.endswith(f"{place}-{target}") for word in words)


def test_the_output_has_a_name_of_its_own_unless_given_one(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = adapter.with_name(f"{adapter.name}-llama.cpp")
    assert main(["export", str(adapter), "--target", "llama.cpp"]) == 0
    assert str(place) in capsys.readouterr().out
    assert len(tests.readers.llama_cpp.read(place)) == 14


def test_names_of_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.cli.export import _default_output

    monkeypatch.chdir(tmp_path)
    assert _default_output(Path("runs/mails"), "mlx") == Path("runs/mails-mlx")
    assert _default_output(Path("."), "mlx") == tmp_path.with_name(f"{tmp_path.name}-mlx")
    assert _default_output(Path("mails"), "llama.cpp") == Path("mails-llama.cpp")  # of the hub: org/mails


def test_as_json(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapter), str(tmp_path / "out"), "--target", "mlx", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == "mlx" and report["exact"] and report["worst_error"] == 0
    assert report["files"] == ["adapter_config.json", "adapters.safetensors"]
    assert len(report["modules"]) == 14 and report["folded"] == report["left_out"] == []
    linears = {path: module.weight for path, module in tiny_model().named_modules() if "_proj" in path}
    assert len(tests.readers.mlx.read(tmp_path / "out", linears)) == 14


def test_what_is_rounded_is_said(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(adapter), str(tmp_path / "out"), "--target", "plain", "--dtype", "bfloat16"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "0 of 14 updates equal those of the adapter exactly" in out
    assert "one rounding of their factors" in out and "--dtype float32 rounds less" in out


def test_dora_is_refused_with_the_flags_that_help(
    dora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(dora), str(tmp_path / "out"), "--target", "vllm"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert (
        "magnitudes of DoRA" in error and "--dora-to-plain and --rank N" in error and "veneer merge" in error
    )
    assert "dora_to_plain" not in error and list(tmp_path.iterdir()) == []
    assert main([*words, "--dora-to-plain", "--rank", "8"]) == 0
    captured = capsys.readouterr()
    assert "DoRA made plain: " in captured.out and "of an update is missed on average" in captured.out
    assert "modules made plain 4/4" in captured.err
    assert main([*words, "--dora-to-plain"]) == 2
    assert "--rank N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["ADAPTER"], 2, "--target"),
        (
            ["ADAPTER", "--target", "gguf"],
            2,
            "there are diffusers, llama.cpp, mlx, ollama, plain, sglang, vllm",
        ),
        (["ADAPTER", "--target", "vllm", "--rnak", "4"], 2, "--rank"),
        (["ADAPTER", "--target", "vllm", "--rank", "4"], 2, "--dora-to-plain"),
        (["ADAPTER", "--target", "vllm", "--rank", "0", "--dora-to-plain"], 2, "--rank"),
        (["ADAPTER", "--target", "vllm", "--dtype", "int8"], 2, "bfloat16"),
        (["ADAPTER", "--target", "vllm", "--component", "unet"], 2, "no such parts"),
        (["ADAPTER", "--target", "diffusers"], 2, "--component unet"),
        (["NOWHERE", "--target", "vllm"], 1, "there is no directory"),
        (["BROKEN", "--target", "vllm"], 1, "truncated"),
        (["ADAPTER", "FULL", "--target", "vllm"], 1, "--overwrite-output-dir"),
        (["ADAPTER", "FILE", "--target", "vllm"], 1, "is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_sentence(
    words: list[str],
    code: int,
    said: str,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"ADAPTER": adapter, "NOWHERE": tmp_path / "nowhere"}
    places |= {name: tmp_path / name.lower() for name in ("BROKEN", "FULL", "FILE")}
    for name in ("BROKEN", "FULL"):
        places[name].mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            raw = (adapter / file).read_bytes()
            (places[name] / file).write_bytes(raw if name == "FULL" or "json" in file else raw[:-9])
    places["FILE"].write_text("")
    before = sorted(tmp_path.rglob("*"))
    given = [str(places.get(word, word)) for word in words]
    if len(words) < 2 or words[1].startswith("--"):
        given.insert(1, str(tmp_path / "out"))
    assert main(["export", *given]) == code
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_control_c_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Vllm.write

    def interrupted(*given: Any) -> None:
        write(*given)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Vllm, "write", interrupted)
    words = ["export", str(adapter), str(tmp_path / "new" / "out"), "--target", "vllm"]
    assert main(words) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []
