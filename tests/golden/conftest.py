"""The contents of a golden file, and its base model. The module has `DATA`, `CASES` and a fixture `name`."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn


@pytest.fixture
def golden(request: pytest.FixtureRequest, name: str) -> dict[str, Tensor]:
    return load_file(request.module.DATA / name / "golden.safetensors")


@pytest.fixture
def base(request: pytest.FixtureRequest, name: str, golden: dict[str, Tensor]) -> nn.Module:
    model: nn.Module = request.module.CASES[name].build().eval()
    model.load_state_dict({k.removeprefix("base."): t for k, t in golden.items() if k.startswith("base.")})
    return model
