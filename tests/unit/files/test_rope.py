"""Rotary embeddings are written under both names, and read by transformers as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.files.rope import older_names, write_older_names

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, {"rope_theta": 1e5}),
        ({"rope_parameters": {"rope_theta": 1e5}, "rope_theta": 1e5}, {}),
        ({"rope_parameters": LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {}),
        ({"rope_theta": 1e4}, {}),
        ({}, {}),
    ],
)
def test_what_is_missing_at_the_top(config: dict[str, Any], added: dict[str, Any]) -> None:
    assert older_names(config) == added


@pytest.mark.parametrize("parameters", [{"rope_theta": 1e5, "rope_type": "default"}, LLAMA3])
def test_transformers_reads_the_same(parameters: dict[str, Any], tmp_path: Path) -> None:
    from transformers import LlamaConfig

    before = LlamaConfig(max_position_embeddings=512, rope_parameters=dict(parameters))
    before.save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    write_older_names(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == parameters["rope_theta"]
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters == before.rope_parameters
