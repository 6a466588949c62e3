"""`veneer plan`: what a person sees, flags and files shared with `veneer train`, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from veneer.cli import main
from veneer.training.planning import plan_training

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
SMALL = ["--batch-size", "2", "--max-length", "16"]


def test_plan(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(base), *SMALL, "--lora-r", "4"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out and "gate_proj" in out and "activations" in out
    assert out.splitlines()[1] == "" and "\\n" not in out
    assert max(map(len, out.replace(str(base), "").splitlines())) <= 80
    assert main(["plan", str(base), *SMALL, "--lora_r", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimate"]["trainable"] == 3712 and found["lora_r"] == 4


@pytest.mark.parametrize("less", [0, 10**6])
def test_the_peak_is_said_to_be_less_only_where_it_is(
    less: int, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*given: Any, **more: Any) -> Any:
        found = plan_training(*given, **more)
        parts = ("base", "factors", "gradients", "optimizer", "activations", "logits")
        total = sum(getattr(found.estimate, part) for part in parts) + 2 * less
        estimate = replace(found.estimate, base=found.estimate.base + 2 * less, peak=total - less)
        return replace(found, estimate=estimate)

    monkeypatch.setattr("veneer.training.planning.plan_training", planned)
    assert main(["plan", str(base), *SMALL]) == 0
    assert ("The peak is less than the sum" in capsys.readouterr().out) == bool(less)


def test_near_misses_and_what_is_left_out(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(base), *SMALL, "--lora-target-modules", "q_proj,v_prj"]) == 0
    out = capsys.readouterr().out
    assert "v_prj" in out and "v_proj" in out
    assert main(["plan", str(base), *SMALL, "--target-modules", "q_prj"]) == 1
    assert "q_proj" in capsys.readouterr().err


def test_the_file_of_a_run_is_understood(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {base}\ndata: d.jsonl\noutput: out\nlora_r: 2\nmax_length: 16\nsave_steps: 5\n")
    assert main(["plan", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora_r"] == 2
    assert main(["plan", str(base), str(file), "--lora-r", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora_r"] == 3
    file.write_text("lora_rank: 2\n")
    assert main(["plan", str(file)]) == 2
    assert "lora_rank" in capsys.readouterr().err


def test_budgets(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(base), *SMALL, "--budget", "5%"]) == 0
    out = capsys.readouterr().out
    assert "Keeps to the budget: rank" in out and "veneer train --model" in out
    for budget, words in (("foo", "24GB"), ("0%", "above 0%"), ("24", "unit")):
        assert main(["plan", str(base), "--budget", budget]) == 2
        assert words in capsys.readouterr().err
    assert main(["plan", str(base), *SMALL, "--budget", "10kB"]) == 1
    assert "nothing fits into 10kB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["./nowhere"], 1, "does not exist"),
        ([".", "--batch-size", "0"], 2, "batch"),
        ([".", "--quantize", "nf5"], 2, "nf4"),
        ([".", "--device", "tpu"], 2, "cuda"),
        ([], 2, "model"),
    ],
)
def test_refusals(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_seventy_billion_parameters_from_the_configuration_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    command = ["plan", str(tmp_path), "--batch-size", "1", "--lora-target-modules", "q_proj,v_proj", "--json"]
    assert main([*command, "--quantize", "nf4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["patterns"]["q_proj"]["layers"] == list(range(80))
    assert found["estimate"]["trainable"] == 80 * 16 * (2 * 8192 + 8192 + 1024)
    assert 36e9 < found["estimate"]["base"] < 42e9
    assert found["estimate"]["traced"]


def test_experts_and_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 32, "pad_token_id": 0}
    kind = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(kind | small | more))
    command = ["plan", str(tmp_path), *SMALL, "--lora-r", "2"]
    assert main([*command, "--target-modules", "q_proj", "--target-parameters", "experts.down_proj"]) == 0
    out = capsys.readouterr().out
    assert "experts.gate_up_proj" in out and "4,608" in out and "not adapted" in out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["patterns"]["gate_up_proj"]["modules"] == 2
    assert [group["name"] for group in found["left_out"]] == ["embed_tokens", "lm_head"]
    file = tmp_path / "run.yaml"
    file.write_text('target_parameters: [experts.down_proj]\nlora_target_modules: ""\nlora_dropout: 0.1\n')
    assert main([*command[:2], str(file)]) == 1
    assert "set --lora-dropout 0" in capsys.readouterr().err
    assert main([*command, "--lora-dropout", "0.1"]) == 1
    assert "--lora-target-modules means experts and routers too" in capsys.readouterr().err
    file.write_text('target_parameters: [experts.down_proj]\nlora_target_modules: ""\n')
    assert main([*command[:2], str(file), *SMALL, "--json", "--budget", "50%"]) == 0
    assert json.loads(capsys.readouterr().out)["target_parameters"] == ["experts.down_proj"]
