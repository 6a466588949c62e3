"""Every command checks its flags and paths before it imports a library that takes seconds to import."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from veneer.cli import common
from veneer.training import progress
from veneer.training.console import PlainConsole

#: Imported by no check. Of numpy and safetensors torch and transformers bring their own.
HEAVY = tuple(
    "torch transformers datasets accelerate trl peft diffusers numpy safetensors huggingface_hub".split()
)
GOLDEN = Path(__file__).parents[2] / "golden" / "data"
Run = Callable[[Sequence[str]], int]


class Blocked(Exception):
    """A library was imported."""


class Blocker:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in HEAVY:
            raise Blocked(f"{name} was imported before everything was checked")


def _ours() -> dict[str, ModuleType]:
    tops = {"veneer", *HEAVY}
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}


@contextmanager
def _alone(fresh: dict[str, ModuleType]) -> Iterator[None]:
    """With these modules of ours in place of those that are loaded, and without the heavy libraries."""
    before, finders, show = _ours(), list(sys.meta_path), warnings.showwarning
    for name in before:
        del sys.modules[name]
    sys.modules.update(fresh)
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path[:], warnings.showwarning = finders, show
        fresh.update(_ours())
        for name in fresh:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def run() -> Run:
    """The command line as in a process of its own, where an import of a heavy library fails."""
    fresh: dict[str, ModuleType] = {}

    def main(words: Sequence[str]) -> int:
        with _alone(fresh):
            code: int = importlib.import_module("veneer.cli").main(words)
            return code

    return main


@pytest.fixture
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with whatever a command may find."""
    monkeypatch.chdir(tmp_path)
    for name in ("full", "base", "other"):
        Path(name).mkdir()
    Path("full", "notes.txt").write_text("mine")
    Path("base", "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(GOLDEN / "llama_embedding", "adapter")
    configuration = Path("adapter", "adapter_config.json")
    values = json.loads(configuration.read_text())
    configuration.write_text(
        json.dumps({**values, "base_model_name_or_path": "base", "task_type": "CAUSAL_LM"})
    )
    shutil.copytree("adapter", "classifier")
    Path("classifier", "adapter_config.json").write_text(
        json.dumps({**values, "base_model_name_or_path": "base", "task_type": "SEQ_CLS"})
    )
    shutil.copytree("adapter", "orphan")
    Path("orphan", "adapter_config.json").write_text(
        json.dumps({**values, "base_model_name_or_path": "./gone", "task_type": "CAUSAL_LM"})
    )
    shutil.copytree("adapter", "broken")
    tensors = Path("broken", "adapter_model.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-9])
    Path("data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("bad.jsonl").write_text("no JSON\n")
    Path("file").write_text("")
    Path("run", "checkpoint-3").mkdir(parents=True)
    Path("run.yaml").write_text("model: base\ndata: gone.jsonl\noutput: out\n")
    shutil.copy(tensors, "short.safetensors")


TRAIN = "train --model base --data data.jsonl --output"
SWEEP = "sweep --model base --data data.jsonl --grid lora_r=4,8 --output"
CASES = [
    ("extract --base ./gone --tuned base --rank 2 --output full", 1, ["no model at './gone'"]),
    ("data gone.jsonl --model ./gone", 1, ["data file gone.jsonl", "no model at './gone'"]),
    ("data bad.jsonl --model base", 1, ["line 1"]),
    ("data data.jsonl --model base --max-length 0", 2, ["--max-length"]),
    ("push base me/mine", 1, ["no adapter_config.json in"]),
    ("train --resume-from-adapter adapter --data data.jsonl --output out --lora-r 77", 2, ["--lora-r 77 ("]),
    ("train --model base --data gone.jsonl --output out", 1, ["data file gone.jsonl"]),
    ("train run.yaml", 1, ["data file gone.jsonl"]),
    (f"{TRAIN} out --eval-data gone.csv", 1, ["data file gone.csv"]),
    ("train --model ./gone --data data.jsonl --output out", 1, ["no model at './gone'"]),
    ("train --model adapter --data data.jsonl --output out", 1, ["contains an adapter"]),
    (f"{TRAIN} file", 1, ["file is a file"]),
    (f"{TRAIN} file/out", 1, ["cannot write", "file/out"]),
    (f"{TRAIN} run", 1, ["checkpoint-3", "--overwrite-output-dir"]),
    (f"{TRAIN} run --resume", 1, ["no complete checkpoint"]),
    (f"{TRAIN} out --resume", 1, ["contains no checkpoint"]),
    (f"{TRAIN} out --dtype int9", 2, ["--dtype is one of"]),
    (f"{TRAIN} out --method dpo --packing", 2, ["--packing does not go with --method dpo"]),
    (f"{TRAIN} out --init-lora-weights odd", 2, ["odd"]),
    (f"{SWEEP} out --grid lora_rank=4", 2, ["'lora_rank' (did you mean 'lora_r'?)"]),
    (f"{SWEEP} out --grid learning_rate=0", 2, ["--learning-rate must be above 0"]),
    (f"{SWEEP} out --lora-r 4", 2, ["--lora-r is in the grid and given beside it"]),
    (f"{SWEEP} full --model ./gone", 1, ["no model at './gone'", "full is not empty"]),
    (f"{SWEEP} out --resume", 1, ["out contains no sweep. Start without --resume"]),
    ("sweep --model base --data data.jsonl --output out", 2, ["--grid learning_rate=1e-4,3e-4,1e-3"]),
    (
        "train --model ./gone --data gone.jsonl --output file",
        1,
        ["no model at './gone'", "data file gone.jsonl", "file is a file"],
    ),
    ("eval ./gone --data data.jsonl", 1, ["no directory 'gone'"]),
    ("eval file --data data.jsonl", 1, ["file is a file"]),
    (f"{TRAIN} out --eval-data short.safetensors", 1, ["unknown type .safetensors", ".parquet"]),
    ("eval broken --data data.jsonl", 1, ["truncated"]),
    ("eval orphan --data data.jsonl", 1, ["no model at './gone'"]),
    ("eval adapter --data gone.jsonl", 1, ["data file gone.jsonl"]),
    ("eval adapter --data bad.jsonl", 1, ["line 1"]),
    ("eval classifier --data data.jsonl", 1, ["contains no classification head"]),
    ("eval adapter --data data.jsonl --batch-size 0", 2, ["--batch-size"]),
    ("eval adapter --data data.jsonl --quantize int3", 2, ["--quantize"]),
    ("generate gone hello", 1, ["no directory 'gone'"]),
    ("generate classifier hello", 1, ["a classifier"]),
    ("generate adapter hello --model ./gone", 1, ["no model at './gone'"]),
    ("generate adapter hello --data data.jsonl", 2, ["not both"]),
    ("generate adapter hello --top-p 2", 2, ["--top-p"]),
    ("generate adapter --data gone.jsonl", 1, ["data file gone.jsonl"]),
    ("generate adapter --data data.jsonl --output full", 1, ["is a directory"]),
    ("generate adapter --data data.jsonl --output file", 1, ["exists"]),
    ("chat gone", 1, ["no directory 'gone'"]),
    ("chat adapter --adapter b=gone", 1, ["no directory 'gone'"]),
    ("chat adapter --adapter gone", 2, ["NAME=PATH"]),
    ("chat adapter --device gpu", 2, ["--device"]),
    ("chat adapter --no-do-sample --top-k 3", 2, ["--top-k"]),
    ("merge gone --output out", 1, ["no directory 'gone'"]),
    ("merge orphan --output out", 1, ["no model at './gone'"]),
    ("merge adapter --output full", 1, ["not empty"]),
    ("merge adapter --output file/out", 1, ["cannot write"]),
    ("merge adapter --output base --overwrite-output-dir", 1, ["is what is to be merged"]),
    ("merge adapter --output out --low-memory --untie", 2, ["--untie"]),
    ("merge adapter --output out --dtype int8", 2, ["--dtype"]),
    ("plan ./gone", 1, ["no model at './gone'"]),
    ("plan adapter", 1, ["contains an adapter"]),
    ("plan base --budget much", 2, ["24GB"]),
    ("plan base --device tpu", 2, ["cuda"]),
    ("plan base --lora-r 0", 2, ["--lora-r"]),
    ("plan gone.yaml", 2, ["gone.yaml"]),
    ("export gone --target vllm", 1, ["no directory 'gone'"]),
    ("export broken out --target vllm", 1, ["truncated"]),
    ("export adapter out --target gguf", 2, ["there are diffusers, llama.cpp"]),
    ("export adapter full --target vllm", 1, ["not empty"]),
    ("export adapter out --target vllm --rank 4 --dtype int8", 2, ["--rank", "--dtype"]),
    ("export adapter out --target vllm --component unet", 2, ["--component"]),
    ("export orphan out --target vllm --dora-to-plain --rank 4", 1, ["no model at './gone'"]),
    ("import gone.safetensors out", 1, ["gone.safetensors"]),
    ("import short.safetensors out", 1, ["truncated"]),
    ("import adapter out", 1, ["PEFT's format already"]),
    ("import other out", 1, ["no file of tensors"]),
    ("inspect gone", 1, ["no directory 'gone'"]),
    ("inspect broken", 1, ["truncated"]),
    ("inspect full", 1, ["full"]),
    ("inspect adapter --plot map.gif", 2, [".png"]),
    ("inspect adapter --plot gone/map.png", 2, ["gone"]),
    ("convert gone out --layout peft", 1, ["no directory 'gone'"]),
    ("convert adapter out --layout pefd", 2, ["did you mean 'peft'"]),
    ("convert adapter full", 1, ["not empty", "--overwrite-output-dir"]),
    ("convert adapter adapter", 1, ["the adapter itself"]),
    ("resize gone --rank 2 --output out", 1, ["no directory 'gone'"]),
    ("resize adapter --output out", 2, ["--rank", "--energy"]),
    ("resize adapter --rank 2 --energy 0.9 --output out", 2, ["not both"]),
    ("resize adapter --energy 2 --output out", 2, ["--energy must be a share"]),
    ("resize adapter --rank 2 --output full", 1, ["not empty", "--overwrite-output-dir"]),
    ("resize adapter --rank 2 --output adapter", 1, ["the adapter itself"]),
    ("resize broken --rank 2 --output out", 1, ["truncated"]),
    ("diff adapter gone", 1, ["no directory 'gone'"]),
    ("diff broken adapter", 1, ["truncated"]),
    ("diff adapter adapter --energy 0", 2, ["--energy must be a share"]),
    ("combine adapter gone --output out", 1, ["no directory 'gone'"]),
    ("combine adapter broken --output out", 1, ["truncated"]),
    (
        "combine adapter --weights 1,2 --method ties --output out",
        2,
        ["--weights takes a number", "--density"],
    ),
    ("combine adapter --method sum --output out", 2, ["--method is one of"]),
    ("combine adapter --output full", 1, ["not empty"]),
    ("verify gone", 1, ["no directory 'gone'"]),
    ("verify adapter --model ./gone", 1, ["no model at './gone'"]),
    ("verify adapter --dtype int8", 2, ["--dtype"]),
    ("ls gone", 1, ["does not exist"]),
    ("ls full --check --jsn", 2, ["--json"]),
]


@pytest.mark.usefixtures("_places")
@pytest.mark.parametrize(("words", "code", "said"), CASES, ids=[case[0] for case in CASES])
def test_what_is_wrong_is_said_first(
    words: str, code: int, said: list[str], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(words.split()) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "error: " in captured.err
    assert all(part in captured.err for part in said), captured.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("_places")
@pytest.mark.parametrize(
    "words",
    [
        f"{TRAIN} out",
        "eval adapter --data data.jsonl",
        "generate adapter hello",
        "chat adapter",
        "merge adapter --output out",
        "plan base",
        "export adapter --target vllm",
        "inspect adapter",
        "convert adapter out --layout peft",
        "extract --base base --tuned base --rank 2 --output out",
        "resize adapter --rank 2 --output out",
        "diff adapter adapter",
        "combine adapter --output out",
        "verify adapter",
    ],
)
def test_the_libraries_come_after_the_checks(
    words: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other half: what is right goes on to the import, which is blocked here."""
    assert run(words.split()) == 1
    assert "torch was imported before everything was checked" in capsys.readouterr().err


def test_what_takes_long_is_said_before_it_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = threading.Event()
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    monkeypatch.setattr(progress.Terminal, "say", lambda self, line: (print(line), imported.set()))
    monkeypatch.setattr(common.importlib, "import_module", lambda name: imported.wait(60))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    common.load_libraries("colorsys", "os", "no_such_library")
    assert capsys.readouterr().out == "Loading colorsys …\n"
    monkeypatch.setenv("RANK", "1")
    imported.set()
    common.load_libraries("colorsys")
    assert capsys.readouterr().out == ""


def test_on_a_terminal_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = progress.Terminal()
    shown.console = PlainConsole(file=io.StringIO(), force_terminal=True, color_system=None)
    with shown.waiting("Loading [torch]"):
        pass
    assert "Loading [torch] …" in shown.console.file.getvalue()  # type: ignore[attr-defined]


def test_every_command_is_tried() -> None:
    files = Path(common.__file__).parent.glob("*.py")
    commands = {file.stem.rstrip("_") for file in files if "\n@app.command" in file.read_text()}
    assert {words.partition(" ")[0] for words, _, _ in CASES} == commands and len(commands) > 9
