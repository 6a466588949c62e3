"""Every command as a process on a real language model: exit codes, streams, JSON, Ctrl-C, a full disk."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_python
from tests.programs import program
from tests.unit.training.tiny import saved_records, saved_tiny

pytestmark = [pytest.mark.model, pytest.mark.slow]

VENEER = [sys.executable, "-m", "veneer"]
SHORT = "--max-steps 2 --batch-size 2 --lora-r 4 --lora-alpha 16 --learning-rate 1e-3".split()


def veneer(
    *words: str | Path,
    cwd: Path | None = None,
    said: str | None = None,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VENEER, *map(str, words)],
        cwd=cwd,
        input=said,
        stdin=subprocess.DEVNULL if said is None else None,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=before,
    )


def done(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The result of a command that must have succeeded, without colours and tracebacks."""
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr and "Traceback" not in result.stderr
    return result


def parsed(result: subprocess.CompletedProcess[str]) -> Any:
    """Standard output, which must be one JSON document and nothing else."""
    return json.loads(done(result).stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def refused(result: subprocess.CompletedProcess[str], code: int) -> str:
    """What was said by a command that must have failed: one message, on standard error alone."""
    assert result.returncode == code, result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr and "bug" not in result.stderr
    assert result.stderr.count("error: ") == 1
    return result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    examples = program("examples/data.py")
    found = map(examples.record_of, examples.headers()["train"])
    records = sorted(found, key=lambda record: len(record["prompt"]))[:8]
    place = tmp_path_factory.mktemp("data") / "mails.jsonl"
    place.write_text("".join(json.dumps(record) + "\n" for record in records))
    return place


@pytest.fixture(scope="module")
def trained(
    smollm2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    place = tmp_path_factory.mktemp("trained") / "adapter"
    words = ["train", "--model", smollm2, "--data", data, "--output", place, *SHORT, "--json"]
    return place, veneer(*words)


@pytest.fixture(scope="module")
def adapter(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    done(trained[1])
    return trained[0]


def test_train(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    place, result = trained
    metrics = parsed(result)
    assert metrics["steps"] == 2 and len(metrics["losses"]) == 2
    assert "2/2" in result.stderr
    names = {file.name for file in place.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "tokenizer.json"} <= names


def test_inspect(adapter: Path, tmp_path: Path) -> None:
    found = parsed(veneer("inspect", adapter, "--json", "--plot", tmp_path / "map.png"))
    assert found["layers"] == len(found["updates"]) == 210 and found["scalings"] == [4.0]
    assert all(0 < update["effective_rank"] <= 4 for update in found["updates"])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_generate(adapter: Path) -> None:
    asked = veneer("generate", adapter, "--max-new-tokens", "4", said="Hello.\n")
    assert done(asked).stdout.strip()
    waited = [line for line in asked.stderr.splitlines() if line.endswith(" …")]  # on a slow machine
    assert asked.stderr.splitlines() == waited


def test_eval(adapter: Path, data: Path) -> None:
    words = ["eval", adapter, "--data", data, "--max-samples", "2", "--no-exact-match"]
    found = parsed(veneer(*words, "--json"))
    assert found["adapter"]["loss"] < found["base"]["loss"]


def test_chat_reads_a_script(adapter: Path) -> None:
    talk = veneer("chat", adapter, "--max-new-tokens", "3", said="Hello.\n/base\n/again\n/exit\n")
    assert len(done(talk).stdout.strip().splitlines()) >= 2
    assert "base" in talk.stderr


def test_what_needs_no_weights(smollm2: Path, adapter: Path) -> None:
    planned = parsed(veneer("plan", smollm2, "--lora-r", "4", "--json"))
    (found,) = parsed(veneer("ls", adapter.parent, "--json"))
    assert planned["estimate"]["trainable"] == found["parameters"] == 4 * 305_280
    assert found["path"].endswith("adapter") and not found["problems"]


def test_merge_loads_in_plain_transformers(adapter: Path, tmp_path: Path) -> None:
    report = parsed(veneer("merge", adapter, "--output", tmp_path / "merged", "--json"))
    assert len(report["kept"]["modules"]) == 210 and report["dtype"] == "bfloat16"
    assert 0 < report["kept"]["worst"] <= report["kept"]["mean"] < 0.9
    run_python(
        "import sys; sys.modules['veneer'] = sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n"
        "AutoTokenizer.from_pretrained(sys.argv[1]); GenerationConfig.from_pretrained(sys.argv[1])\n"
        "_, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n",
        tmp_path / "merged",
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["inspect", "nowhere", "--jsn"], 2, "--json"),
        (["inspect", "nowhere"], 1, "no directory 'nowhere'"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--lora_r", "0"], 2, "--lora-r must be"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_usage(words: list[str], code: int, said: str, tmp_path: Path) -> None:
    assert said in refused(veneer(*words, cwd=tmp_path), code)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_found_before_anything_is_written(smollm2: Path, tmp_path: Path) -> None:
    words = ["train", "--model", smollm2, "--data", "nowhere.jsonl", "--output", "out", *SHORT]
    assert "nowhere.jsonl" in refused(veneer(*words, cwd=tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    result = veneer("merge", adapter, "--output", "out/merged", "--low-memory", cwd=tmp_path, before=small)
    assert result.returncode == 1 and "error: the disk is full" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def interrupted(words: list[str | Path], sign: str, cwd: Path) -> tuple[int, str]:
    """Exit code and standard error of a command that gets Ctrl-C once it has said `sign`."""
    with subprocess.Popen(
        [*VENEER, *map(str, words)], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if sign in line:
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr.read()
        return process.wait(timeout=120), said


def test_control_c_while_training(smollm2: Path, data: Path, tmp_path: Path) -> None:
    words = ["train", "--model", smollm2, "--data", data, "--output", "out", *SHORT, "--max-steps", "200"]
    code, said = interrupted(words, "raining", tmp_path)
    assert code == 130 and "Traceback" not in said


def test_control_c_in_a_sweep_saves_it(tmp_path: Path) -> None:
    saved_tiny(tmp_path / "base")
    saved_records(tmp_path / "data.jsonl")
    words = "sweep --model base --data data.jsonl --output out --grid lora_r=2,4,8 --batch-size 2".split()
    code, said = interrupted([*words, "--max-steps", "900"], "stopped after step 300", tmp_path)
    assert code == 130 and "Traceback" not in said
    assert "To go on:\n  veneer sweep --grid lora_r=2,4,8 --model base --data data.jsonl --output out" in said
    saved = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert not saved["finished"] and (tmp_path / "out" / saved["state"] / "family.pt").is_file()
    found = parsed(veneer(*words, "--max-steps", "900", "--resume", "--json", cwd=tmp_path))
    assert found["finished"] and [len(run["losses"]) for run in found["runs"]].count(900) == 1


@pytest.mark.parametrize("module", ["typer", "torch", "veneer.training.spectra"])
def test_control_c_while_starting(module: str, adapter: Path) -> None:
    """Pressed while a module is being imported, which is what the first second consists of."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
        "sys.argv[:] = ['veneer', 'inspect', sys.argv[1]]\n"
        "runpy.run_module('veneer', run_name='__main__')\n"
    )
    result = run_python(code, adapter, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")
