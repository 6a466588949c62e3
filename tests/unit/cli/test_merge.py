"""`veneer merge`: the result works where neither Veneer nor PEFT can be imported."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.unit.cli.words import train_words
from tests.unit.training.test_merge_files import adapter_of, base_of
from tests.unit.training.tiny import saved_records
from veneer.cli import main
from veneer.training import load_base


def test_merge(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["Double 11.", "--max-new-tokens", "5", "--json"]
    assert main(["generate", str(adapter), *question]) == 0
    expected = json.loads(capsys.readouterr().out)["generated_text"]
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["kept"]["modules"]) == 14 and report["kept"]["worst"] > 0.999
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names
    # Where neither library can be imported.
    code = (
        "import sys; sys.modules['veneer'] = sys.modules['peft'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"place = {str(tmp_path / 'merged')!r}\n"
        "tokenizer = AutoTokenizer.from_pretrained(place)\n"
        "model = AutoModelForCausalLM.from_pretrained(place)\n"
        "chat = [{'role': 'user', 'content': 'Double 11.'}]\n"
        "text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)\n"
        "ids = tokenizer(text, return_tensors='pt')['input_ids']\n"
        "out = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1]:]\n"
        "print(tokenizer.decode(out, skip_special_tokens=True), end='')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_merge_in_words(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter), "--output", str(tmp_path), "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "14 modules merged into float32; 100.0% of the update kept" in out and str(tmp_path) in out
    assert "down_proj" in out and "model.layers.0.mlp.down_proj" in out


def test_rounding_away_is_said(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    faint = {k: t * 1e-3 if ".lora_B." in k else t for k, t in tensors.items()}
    (tmp_path / "adapter").mkdir()
    save_file(faint, tmp_path / "adapter" / "adapter_model.safetensors")
    config = (adapter / "adapter_config.json").read_bytes()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(config)
    words = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["dtype"] == "bfloat16" and report["outputs"]["share"] > 0.1
    assert "of the update survived rounding to bfloat16" in captured.err
    assert captured.err.count("rounding to") == 1
    assert "on a sample text its outputs are off by" in captured.err
    assert "--dtype float32 keeps all" in captured.err
    assert main([*words, "--low-memory", "--overwrite-output-dir"]) == 0
    said = capsys.readouterr().err
    assert "of the update survived rounding to bfloat16" in said and "--dtype float32 keeps all" in said
    assert f"veneer eval, of {tmp_path / 'out'} and of the adapter" in said
    assert "by how much is not measured, as --low-memory loads no model" in said


def test_nothing_is_half_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import PreTrainedTokenizerFast

    def full(self: object, place: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    assert main(["merge", str(adapter), "--output", str(tmp_path / "new" / "merged")]) == 1
    assert "disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_is_not_written_over(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    words = ["merge", str(adapter), "--output", str(tmp_path)]
    assert main(words) == 1
    assert "--overwrite-output-dir" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2
    assert main([*words, "--overwrite-output-dir"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "notes.txt"} <= names and "model-00001-of-00002.safetensors" not in names


def test_shared_weights_are_named_with_the_flag(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "base"
    shutil.copytree(base, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(place / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    data = saved_records(tmp_path / "data.jsonl")
    assert main(train_words(place, data, tmp_path / "a", "--target-modules", "lm_head,q_proj")) == 0
    capsys.readouterr()
    words = ["merge", str(tmp_path / "a"), "--output", str(tmp_path / "merged")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "lm_head" in error and "embed_tokens" in error and "--untie" in error and "=True" not in error
    assert not (tmp_path / "merged").exists()
    assert main([*words, "--untie"]) == 0


def test_from_file_to_file(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "merge",
        str(adapter),
        "--low-memory",
        "--dtype",
        "bfloat16",
        "--output",
        str(tmp_path / "merged"),
    ]
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["kept"]["modules"]) == 14
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert main([*words, "--untie", "--device", "cpu", "--quantize", "nf4"]) == 2
    assert "--untie, --quantize, --device: not with --low-memory" in capsys.readouterr().err


def test_into_a_quantised_base(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter), "--output", str(tmp_path), "--quantize", "nf4"]) == 0
    assert "14 modules merged into nf4" in capsys.readouterr().out
    model, _ = load_base(tmp_path)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("way", [[], ["--low-memory"]])
def test_nothing_is_said_to_be_kept_of_a_base_that_is_not_finite(
    way: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = base_of(tmp_path / "base"), tmp_path / "adapter"
    adapter_of(base, adapter)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert main(["merge", str(adapter), "--output", str(tmp_path / "out"), *way]) == 0
    captured = capsys.readouterr()
    assert "5 modules merged" in captured.out and "not all of them are finite" in captured.out
    assert "undefined" in captured.out and "NaN or infinity" in captured.err
    assert main(["merge", str(adapter), "--output", str(tmp_path / "json"), "--json", *way]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert kept["mean"] is kept["worst"] is kept["modules"]["model.layers.0.self_attn.q_proj"] is None
