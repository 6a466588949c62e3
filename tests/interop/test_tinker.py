"""What Tinker's own code makes of its layout, beside what Veneer makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.laws.expert_layouts import EXPERTS, HIDDEN, INNER, MIXTURES, deltas, factors, read
from tests.laws.test_expert_layouts import same
from tests.processes import run_python
from tests.unit.tools.test_converting import archive, loaded, save
from veneer.tools import convert_adapter

COOKBOOK = Path(__file__).parents[2] / ".cache" / "data" / "tinker-cookbook-0.6.1"

#: It imports what downloads, which nothing here does.
PROGRAM = """
import sys
from types import ModuleType

for name in ("tinker", "pyrage"):
    sys.modules[name] = ModuleType(name)
sys.modules["pyrage"].DecryptError = OSError

from tinker_cookbook.weights._adapter import build_lora_adapter

base, adapter, output = sys.argv[1:]
build_lora_adapter(base_model=base, adapter_path=adapter, output_path=output)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    place = tmp_path_factory.mktemp("base")
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(place)
    return place


@pytest.mark.parametrize("kind", ["plain", "shared"])
def test_both_read_the_same(kind: str, base: Path, tmp_path: Path) -> None:
    """From one directory: Tinker's code writes an adapter for servers, Veneer imports the archive of it."""
    assert COOKBOOK.is_dir(), "make examples-data fetches it"
    source, mixture = save(tmp_path / "tinker", "tinker", kind=kind), MIXTURES["qwen3_moe"]
    done = run_python(
        PROGRAM, str(base), str(source), str(tmp_path / "theirs"), env={"PYTHONPATH": str(COOKBOOK)}
    )
    assert (tmp_path / "theirs" / "adapter_config.json").is_file(), done.stdout + done.stderr
    config, tensors = loaded(tmp_path / "theirs")
    same(read("transformers-4", mixture, config, tensors), deltas(factors(kind)))

    packed = archive(source, tmp_path / "run.tar")
    convert_adapter(packed, tmp_path / "ours", layout="transformers-4", base=base)
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
