"""`veneer merge`: the result works where neither Veneer nor PEFT can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.cli import main


def test_merge(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["Double 11.", "--max-new-tokens", "5", "--json"]
    assert main(["generate", str(adapter), *question]) == 0
    expected = json.loads(capsys.readouterr().out)["answer"]
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
    assert "14 modules merged; 100.0% of the update kept" in out and str(tmp_path) in out
