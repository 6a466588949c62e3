from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from veneer.files.fingerprint import compare_fingerprints, fingerprint

NAMES = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(12) for m in "qv"]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {n: torch.randn(24, 16) * 0.02 for n in NAMES}


def make(
    weights: dict[str, torch.Tensor], name: str | None = "LlamaForCausalLM", vocabulary: int | None = 100
) -> Any:
    return json.loads(json.dumps(fingerprint(name, vocabulary, weights)))


def test_what_is_in_it(weights: dict[str, torch.Tensor]) -> None:
    made = make(weights)
    assert (made["architecture"], made["vocab_size"], made["weights"]) == ("LlamaForCausalLM", 100, 24)
    assert len(made["samples"]) == 16
    for path, sample in made["samples"].items():
        assert sample["shape"] == [24, 16]
        values = weights[path].flatten()
        assert len(sample["values"]) == 16
        for value in sample["values"]:
            assert (values - value).abs().min() <= abs(value) * 2**-7
    assert make(weights) == made


def test_samples_are_spread_over_layers_rows_and_columns() -> None:
    places = torch.arange(24.0 * 16).reshape(24, 16).bfloat16().float()
    (sample,) = make({"w": places})["samples"].values()
    assert len(set(sample["values"])) == 16 and len({int(v) // 48 for v in sample["values"]}) >= 6
    assert list(make({n: places for n in NAMES})["samples"])[-1].startswith("model.layers.11")


def test_size() -> None:
    long = {f"base.{'very_long_name.' * 8}{i}.weight": torch.randn(4096, 2) * 1e-3 for i in range(400)}
    assert len(json.dumps(make(long))) < 4096
    assert len(make(long)["samples"]) > 4
    assert make({"x" * 5000: torch.ones(2, 2)})["samples"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_makes_no_difference(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    other = make({k: w.to(dtype) for k, w in weights.items()})
    compared = compare_fingerprints(make(weights), other)
    assert (compared.severity, compared.problems, compared.compared) == ("none", (), 16)


def test_layout_makes_no_difference(weights: dict[str, torch.Tensor]) -> None:
    assert make({k: w.t().contiguous().t() for k, w in weights.items()}) == make(weights)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 2, 1), (2, 3, 4, 5, 6)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert len(make({"w": torch.randn(shape)})["samples"]["w"]["values"]) == 16


def test_another_base_of_the_same_shape_is_wrong(weights: dict[str, torch.Tensor]) -> None:
    compared = compare_fingerprints(
        make(weights), make({k: torch.randn_like(w) * 0.02 for k, w in weights.items()})
    )
    assert compared.severity == "wrong" and compared.difference is not None and compared.difference > 1
    assert "another base model" in compared.problems[0]


def test_a_base_trained_further_is_a_note(weights: dict[str, torch.Tensor]) -> None:
    compared = compare_fingerprints(
        make(weights), make({k: w + torch.randn_like(w) * 0.002 for k, w in weights.items()})
    )
    assert compared.severity == "note" and "trained further" in compared.problems[0]


def test_other_shapes_are_wrong(weights: dict[str, torch.Tensor]) -> None:
    compared = compare_fingerprints(make(weights), make({k: w[:, :8] for k, w in weights.items()}, "Gemma"))
    assert compared.severity == "wrong"
    assert "had (24, 16), has (24, 8) here (LlamaForCausalLM then, Gemma now)" in compared.problems[0]


def test_the_class_name_alone_is_no_difference(weights: dict[str, torch.Tensor]) -> None:
    bare = make({k.removeprefix("model."): w for k, w in weights.items()}, "LlamaModel")
    compared = compare_fingerprints(make(weights), bare)
    assert (compared.severity, compared.compared) == ("none", 16)


@pytest.mark.parametrize(("now", "severity"), [(100, "none"), (103, "note"), (97, "note"), (None, "none")])
def test_vocabulary_of_the_same_weights(
    weights: dict[str, torch.Tensor], now: int | None, severity: str
) -> None:
    assert compare_fingerprints(make(weights), make(weights, vocabulary=now)).severity == severity


def test_a_smaller_vocabulary_is_wrong_where_weights_cannot_tell(weights: dict[str, torch.Tensor]) -> None:
    hidden = {k: w.to("meta") for k, w in weights.items()}
    assert compare_fingerprints(make(weights), make(hidden, vocabulary=97)).severity == "wrong"
    assert compare_fingerprints(make(weights), make(hidden, vocabulary=103)).severity == "note"


def test_an_embedding_that_was_resized_is_a_note() -> None:
    table = torch.randn(100, 8)
    before, after = make({"embed": table}), make({"embed": torch.cat([table, table[:3]])}, vocabulary=103)
    assert compare_fingerprints(before, after).severity == "note"
    assert compare_fingerprints(before, make({"embed": table[:90]}, vocabulary=103)).severity == "wrong"


def test_what_cannot_be_read_is_passed_over() -> None:
    weights = {
        "int": torch.ones(4, 4, dtype=torch.int8),
        "packed": torch.ones(4, 4, dtype=torch.uint8),
        "float8": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "meta": torch.ones(4, 4, device="meta"),
        "empty": torch.ones(0, 4),
        "good": torch.nn.Parameter(torch.ones(4, 4)),
        "broken": torch.full((4, 4), float("nan")),
    }
    made = make(weights)
    assert set(made["samples"]) == {"good", "broken"} and made["weights"] == 7
    assert made["samples"]["broken"]["values"] == [None] * 16
    assert compare_fingerprints(made, made).severity == "none"


@pytest.mark.parametrize(
    "hostile",
    [
        {},
        {"samples": 3},
        {"samples": {NAMES[0]: {"shape": [24, 16], "values": ["x"] * 16}}},
        {"samples": {NAMES[0]: {"shape": [24, 16], "values": [1.0]}}},
        {"samples": {NAMES[0]: {"shape": [24, 16], "values": [1e300] * 16}}},
        {"samples": {NAMES[0]: {"shape": [], "values": [1.0] * 16}}, "vocab_size": "many"},
        {"samples": {NAMES[0]: {"shape": None}}},
    ],
)
def test_a_hostile_fingerprint_is_no_crash(weights: dict[str, torch.Tensor], hostile: dict[str, Any]) -> None:
    compared = compare_fingerprints(hostile, make(weights))
    assert compared.severity != "none" and compared.problems
