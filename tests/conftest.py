"""What every test starts from: offline, seeded, one compute thread a worker, no user's settings."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before torch, transformers and huggingface_hub are imported: they read these once. Child processes inherit.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=str(ROOT / ".cache" / "huggingface"),
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
)
os.environ.pop("VENEER_AS_PEFT", None)
# Started in the background the tests are deaf to Ctrl-C, and so would be the commands whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests import refusals  # noqa: E402
from tests.programs import program  # noqa: E402

torch.set_num_threads(1)

# Deadlines measure the machine; a derandomised run is one that can be repeated.
hypothesis.settings.register_profile("veneer", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("veneer")


#: What takes longest, begun first: a worker that came to one of these last would leave the other idle.
LONGEST = (
    "laws/test_sharding.py",
    "unit/ops/test_triton_lora.py",
    "docs/test_docs.py",
    "unit/training/test_run.py",
    "laws/test_layers.py",
    "laws/test_family.py",
    "laws/test_compile.py",
    "laws/test_family_layers.py",
    "laws/test_saves.py",
    "laws/test_out_of_memory.py",
    "unit/cli/test_train.py",
    "laws/test_mixed_batch.py",
    "unit/training/test_starting.py",
    "unit/sweep/test_worker.py",
    "docs/test_made_pages.py",
    "architecture/test_lean_import.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """A run of all tests fails if a refusal of the sources was never raised."""
    refusals.register(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files come first; without a CUDA device its tests are left out, and no others ever are."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module", autouse=True)
def swept() -> None:
    """What lives when a file of tests begins is not searched for garbage again, as every `Trainer` does."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nopeft_python() -> Path:
    """The interpreter of an environment equal to this one, but without the reference library."""
    if given := os.environ.get("VENEER_NOPEFT_PYTHON"):
        return Path(given)
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_nopeft_env.py"], capture_output=True, text=True, check=True
    )
    return Path(made.stdout.strip())


@pytest.fixture(scope="session")
def models() -> Path:
    """The directory with the packages of requirements/models.txt."""
    place = ROOT / ".cache" / "models"
    if not (place / ".stamp").is_file():
        pytest.fail(f"no pretrained models in {place}: run `make setup-test`")
    return place


@pytest.fixture(scope="session")
def smollm2(models: Path) -> Path:
    """SmolLM2-135M-Instruct as a transformers directory, where the demo looks for it too; made once."""
    return Path(program("tools/smollm2.py").fetch())
