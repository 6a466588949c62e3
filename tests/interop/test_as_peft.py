"""Veneer in the place of peft: where peft is absent, and where it is installed. Each in a fresh process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.processes import run_python
from veneer.integrations.as_peft.layout import OTHER_PACKAGES

ROOT = Path(__file__).resolve().parents[2]
REGISTER = "from veneer_as_peft import register_as_peft\nregister_as_peft()\n"


@pytest.fixture(params=["peft absent", "peft installed"])
def python(request: pytest.FixtureRequest) -> str:
    """Interpreters of both environments."""
    absent = request.param == "peft absent"
    return str(request.getfixturevalue("nopeft_python") if absent else sys.executable)


def test_the_two_environments_are_what_they_are_called(nopeft_python: Path) -> None:
    ask = """
import importlib.metadata, importlib.util
try:
    version = importlib.metadata.version("peft")
except importlib.metadata.PackageNotFoundError:
    version = None
print(importlib.util.find_spec("peft") is not None, version)
"""
    assert run_python(ask, python=nopeft_python).stdout == "False None\n"
    assert run_python(ask).stdout.startswith("True ")


def test_detection_needs_no_heavy_import(python: str) -> None:
    """find_spec and metadata answer before torch, transformers or veneer itself are there."""
    run_python(
        """
import importlib.metadata, importlib.util, sys

import veneer_as_peft

def heavy():
    return {"torch", "transformers", "veneer"} & set(sys.modules)

assert not heavy(), heavy()
veneer_as_peft.register_as_peft(version="0.99.1")
spec = importlib.util.find_spec("peft")
assert spec is not None and spec.origin == "veneer"
assert importlib.metadata.version("peft") == "0.99.1"
assert importlib.metadata.version("PEFT") == "0.99.1"
assert set(importlib.metadata.packages_distributions()["peft"]) == {"peft"}
assert list(importlib.metadata.distributions(name="peft", path=["/nowhere"])) == []
assert importlib.metadata.version("torch")
assert not heavy(), heavy()
import peft
assert peft.__version__ == "0.99.1"
veneer_as_peft.register_as_peft(version="0.21.2")
assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2"
""",
        python=python,
    )


def test_one_object_under_every_path(python: str) -> None:
    run_python(
        REGISTER
        + """
import importlib, sys
import peft, veneer
from veneer.integrations.as_peft.layout import LAYOUT
from veneer.layers import LoraLayer

for name in LAYOUT:
    module = importlib.import_module(name)
    assert module is sys.modules[name] and module.__spec__.name == module.__name__ == name
    for word in LAYOUT[name]:
        assert getattr(module, word) is not None
for word in veneer.__all__:
    if word in LAYOUT["peft"]:
        assert getattr(peft, word) is getattr(veneer, word), word
from peft.tuners.lora import LoraLayer as first
from peft.tuners.lora.layer import LoraLayer as second
from peft.tuners.tuners_utils import BaseTunerLayer
assert first is second is LoraLayer and issubclass(first, BaseTunerLayer)

# The same module objects, also for whoever clears the table of modules.
before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "peft"}
for name, module in before.items():
    assert importlib.import_module(name) is module
assert importlib.reload(sys.modules["peft"]) is before["peft"]
""",
        python=python,
    )


def test_what_libraries_import_is_there(nopeft_python: Path) -> None:
    """Every `from peft… import …` of transformers, accelerate, TRL, diffusers and sentence-transformers."""
    run_python(
        REGISTER
        + """
import ast, importlib, importlib.util, pathlib, warnings

asked = {}
for library in ("transformers", "accelerate", "trl", "diffusers", "sentence_transformers"):
    spec = importlib.util.find_spec(library)
    if spec is None:
        continue
    for file in pathlib.Path(spec.origin).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "from peft" not in text and "import peft" not in text:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "peft":
                asked.setdefault(("peft", node.attr), file)
            if not isinstance(node, ast.ImportFrom) or node.level:
                continue
            if (node.module or "").partition(".")[0] == "peft":
                for alias in node.names:
                    asked.setdefault((node.module, alias.name), file)
assert len(asked) > 20, asked
lacking = []
for (module, name), file in sorted(asked.items()):
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        lacking.append(f"{module}.{name} (asked by {file}): {error}")
assert not lacking, lacking
""",
        python=nopeft_python,
    )


def test_other_methods_can_be_named_and_not_used(nopeft_python: Path) -> None:
    run_python(
        REGISTER
        + """
import peft
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptLearningConfig
from peft import save_as_lora
from peft.tuners import PromptEncoder
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from veneer import VeneerError

assert not isinstance(LoraConfig(), (PrefixTuningConfig, IA3Config, PromptLearningConfig))
assert IA3Config is peft.IA3Config
assert list(LoHaLayer.adapter_layer_names) == list(LoKrLayer.adapter_layer_names) == []
assert AdaLoraModel is peft.AdaLoraModel and not isinstance(LoraConfig(), IA3Layer)
for thing in (
    IA3Config, PrefixTuningConfig, save_as_lora, PromptEncoder, LoHaLayer, RankAllocator, IA3Layer
):
    try:
        thing(r=3)
    except VeneerError as error:
        assert thing.__name__ in str(error) and "LoRA" in str(error)
    else:
        raise AssertionError(thing)
for wrong in ("from peft import NoSuchThing", "from peft.tuners.ia3 import nothing_of_this_name"):
    try:
        exec(wrong)
    except ImportError as error:
        assert not isinstance(error, ModuleNotFoundError) and wrong.split()[-1] in str(error), error
    else:
        raise AssertionError(wrong)
for wrong in ("import peft.nosuchmodule", "from peft.tuners.lora.nosuchmodule import Linear"):
    try:
        exec(wrong)
    except ModuleNotFoundError as error:
        assert error.name == wrong.split()[1]
        assert "Veneer stands in for peft here" in str(error) and error.name in str(error)
    else:
        raise AssertionError(wrong)
assert not hasattr(peft, "NoSuchThing")
""",
        python=nopeft_python,
    )


def test_every_other_method_of_the_reference_is_known() -> None:
    reference = importlib.util.find_spec("peft")
    assert reference is not None and reference.submodule_search_locations is not None
    tuners = Path(reference.submodule_search_locations[0]) / "tuners"
    packages = {file.parent.name for file in tuners.glob("*/__init__.py")}
    assert packages - {"lora"} == OTHER_PACKAGES


def test_it_refuses_where_peft_has_been_imported() -> None:
    done = run_python(
        """
import peft
from veneer import VeneerError
from veneer.as_peft import register_as_peft
try:
    register_as_peft()
except VeneerError as error:
    print(error)
import importlib.metadata
from peft import LoraModel
assert LoraModel.__module__.startswith("peft."), "peft stays what it was"
"""
    )
    assert "peft itself has been imported" in done.stdout
    assert "python -m veneer.as_peft" in done.stdout


@pytest.mark.parametrize(
    ("early", "named"),
    [
        ("import transformers.trainer", "transformers.trainer_utils"),
        ("import trl.trainer.sft_trainer", "trl.trainer.utils"),
        ("import diffusers", "diffusers"),
    ],
)
def test_it_says_when_it_comes_late(nopeft_python: Path, early: str, named: str) -> None:
    done = run_python(
        f"""
import warnings
{early}
from veneer_as_peft import register_as_peft
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    register_as_peft()
(warning,) = caught
assert warning.category.__name__ == "VeneerWarning"
print(warning.message)
""",
        python=nopeft_python,
    )
    assert named in done.stdout
    assert "Call it first" in done.stdout


def test_in_time_it_says_nothing(nopeft_python: Path) -> None:
    """Importing transformers alone decides nothing: its models ask when they are used."""
    run_python(
        """
import warnings
import transformers
from transformers import LlamaForCausalLM
warnings.simplefilter("error")
from veneer_as_peft import register_as_peft
register_as_peft()
from transformers.utils import is_peft_available
assert is_peft_available()
""",
        python=nopeft_python,
    )


# -- the command line, and child processes -----------------------------------------------------------

SCRIPT = """
import json, sys
import beside
import peft
from peft import LoraConfig

if __name__ == "__main__":
    print(json.dumps({"class": LoraConfig.__module__, "argv": sys.argv, "beside": beside.VALUE}))
    sys.exit(3)
"""


def run_command(
    python: str | Path, *words: str | Path, cwd: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), "-m", "veneer.as_peft", *map(str, words)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_script_runs_unchanged(nopeft_python: Path, tmp_path: Path, how: str) -> None:
    place = tmp_path / "project"
    place.mkdir()
    (place / "beside.py").write_text("VALUE = 42\n")
    (place / "program.py").write_text(SCRIPT)
    words = ["project/program.py"] if how == "script" else ["-m", "program"]
    done = run_command(nopeft_python, *words, "--option", "x", cwd=tmp_path if how == "script" else place)
    assert done.returncode == 3, done.stderr
    answer = json.loads(done.stdout)
    assert answer["class"] == "veneer.config.lora"
    assert answer["argv"][1:] == ["--option", "x"]
    assert answer["argv"][0].endswith("program.py")
    assert answer["beside"] == 42


def test_the_command_explains_itself(tmp_path: Path) -> None:
    said = run_command(sys.executable, "--help", cwd=tmp_path)
    assert said.returncode == 0 and "install" in said.stdout
    alone = run_command(sys.executable, cwd=tmp_path)
    assert alone.returncode == 2 and "usage" in alone.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no_such.py"], "there is no script 'no_such.py'"),
        (["-m", "no_such.module"], "there is no module 'no_such.module'"),
    ],
)
def test_nothing_to_run_is_said_without_a_traceback(words: list[str], said: str, tmp_path: Path) -> None:
    done = run_command(sys.executable, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(params=["peft absent", "peft installed"])
def own_python(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An environment of its own, for what writes into one; with the real peft, or without."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_nopeft_env.py", tmp_path / "env"],
        capture_output=True,
        text=True,
        check=True,
    )
    python = Path(done.stdout.strip())
    if request.param == "peft installed":
        (torch,) = (tmp_path / "env").rglob("site-packages/torch")
        for entry in Path(sysconfig.get_path("purelib")).glob("peft*"):
            (torch.parent / entry.name).symlink_to(entry)
    return python


SPAWN = """
import multiprocessing, sys

def child(queue):
    import peft
    queue.put((peft.LoraConfig.__module__, "veneer_as_peft" in sys.modules))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get(timeout=100), flush=True)
    process.join()
"""


def test_child_processes_see_it_once_installed(own_python: Path, tmp_path: Path) -> None:
    ask = (
        "import importlib.util as u, sys; spec = u.find_spec('peft'); "
        "print(getattr(spec, 'origin', None) == 'veneer', 'torch' in sys.modules)"
    )

    def asked(value: str | None) -> str:
        return run_python(ask, python=own_python, env={"VENEER_AS_PEFT": value}).stdout.strip()

    def spawned(*before: str, **env: str) -> str:
        done = subprocess.run(
            [own_python, *before, tmp_path / "spawn.py"],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.stdout.strip() or done.stderr

    assert asked("1") == "False False", "nothing is installed unasked"
    for _ in range(2):
        done = run_command(own_python, "install", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "env").rglob("*veneer_as_peft.pth*")
    assert str(line) in done.stdout
    assert asked("1") == "True False"
    assert asked(None) == asked("0") == "False False", "only VENEER_AS_PEFT=1 is obeyed"

    (tmp_path / "spawn.py").write_text(SPAWN)
    ours = "('veneer.config.lora', True)"
    assert spawned(VENEER_AS_PEFT="1") == ours
    # A script started with `python -m veneer.as_peft` passes it on to its children by itself.
    assert spawned("-m", "veneer.as_peft") == ours

    assert run_command(own_python, "uninstall", cwd=tmp_path).returncode == 0
    assert not line.exists()
    assert asked("1") == "False False"
    again = run_command(own_python, "uninstall", cwd=tmp_path)
    assert again.returncode == 0 and "nothing to remove" in again.stdout
