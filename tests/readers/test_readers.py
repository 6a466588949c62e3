"""The readers are tried on adapters that nobody exported: what they should take, and what breaks a rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.readers import llama_cpp, mlx, ollama, plain, vllm
from tests.readers.common import Refused
from tests.tolerances import BY_DTYPE, assert_close
from tests.unit.integrations.export.adapters import save

READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "vllm": vllm.read,
    "llama.cpp": llama_cpp.read,
    "ollama": ollama.read,
    "plain": plain.read,
}
#: A case of adapters -> which readers refuse it as it lies there.
RAW = {
    "rslora": "llama.cpp ollama plain",
    "patterns": "vllm llama.cpp ollama plain",
    "dora": "vllm llama.cpp ollama plain",
    "lora_bias": "vllm llama.cpp ollama plain",
    "every bias": "vllm llama.cpp ollama",
    "whole head": "vllm llama.cpp ollama",
    "norms": "vllm llama.cpp ollama",
    "conv2d": "vllm llama.cpp ollama",
    "experts": "vllm llama.cpp ollama plain",
    "tokens": "vllm llama.cpp ollama plain",
    "repeated layers": "vllm plain",
    "llama embedding": "ollama",
}


@pytest.mark.parametrize("name", READERS)
def test_a_plain_adapter_is_taken_by_all(name: str, tmp_path: Path) -> None:
    adapter = save("linear", tmp_path)
    found = READERS[name](adapter.place)
    assert found.keys() == adapter.updates.keys()
    for path, update in adapter.updates.items():
        assert_close(found[path], update, BY_DTYPE[torch.float32])


@pytest.mark.parametrize("case", RAW)
def test_what_breaks_a_rule_is_refused(case: str, tmp_path: Path) -> None:
    place = save(case, tmp_path).place
    refusing = []
    for name, read in READERS.items():
        try:
            read(place)
        except Refused:
            refusing.append(name)
    assert refusing == RAW[case].split()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vllm", {"init_lora_weights": "pissa"}),
        ("vllm", {"r": 1024}),
        ("ollama", {"lora_alpha": 6.5}),
        ("plain", {"lora_alpha": 6.5}),
    ],
)
def test_options_that_are_refused(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    place = save("linear", tmp_path).place
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(Refused):
        READERS[name](place)


def test_a_tied_weight_stops_llama_cpp(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="ignored in base model"):
        llama_cpp.read(save("tied head", tmp_path / "head").place, tied=True)
    with pytest.raises(Refused, match="GGML_ASSERT"):
        llama_cpp.read(save("embedding of a tied base", tmp_path / "embedding").place, tied=True)


def test_ollama_turns_a_factor_whose_rank_is_above_a_side(tmp_path: Path) -> None:
    adapter = save("rank above a side", tmp_path)
    with pytest.raises(RuntimeError):  # the shapes have no product any more
        ollama.read(adapter.place)


def test_mlx_takes_adapter_parameters_of_the_right_shape_only(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(4, 6)}
    given = {"rank": 2, "scale": 0.5, "dropout": 0.0, "keys": ["a"]}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": given}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    good = {"a.lora_a": torch.ones(6, 2), "a.lora_b": torch.ones(2, 4)}
    save_file(good, tmp_path / "adapters.safetensors")
    assert torch.equal(mlx.read(tmp_path, weights)["a"], torch.ones(4, 6).double())
    for bad in (
        {**good, "b.lora_a": torch.ones(6, 2)},
        {**good, "a.m": torch.ones(4)},
        {**good, "a.lora_a": torch.ones(2, 6)},
        {"a.lora_a": torch.ones(6, 2)},
    ):
        save_file(bad, tmp_path / "adapters.safetensors")
        with pytest.raises(Refused):
            mlx.read(tmp_path, weights)
