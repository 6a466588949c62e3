"""Every registered layer, initialisation, variant and backend has a case for the laws."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.laws import cases
from tests.pairwise import Row, pairwise
from tests.storages import backends
from veneer.inits.base import inits
from veneer.layers import registry
from veneer.variants import registry as variants


@pytest.mark.parametrize("type_name", [name for name, _ in registry.items()])
def test_every_layer_type_has_cases(type_name: str) -> None:
    if type_name not in cases.IN_MODELS:
        assert cases.LAYERS.get(type_name), f"add cases for {type_name} to LAYERS of tests/laws/cases.py"


def test_every_init_variant_and_backend_has_a_case() -> None:
    assert {type(init).__name__ for init in inits()} == set(cases.INITS)
    assert set(variants.names()) == set(cases.VARIANTS)
    assert {backend.name for backend in backends()} == set(cases.BACKENDS)


def test_no_table_has_more_than_the_registries() -> None:
    assert {name for name, _ in registry.items()} == set(cases.LAYERS) | set(cases.IN_MODELS)


def test_tables_are_not_emptied_by_refusals() -> None:
    seen = [p.values[0] for p in cases.ALL]
    for type_name, table in cases.LAYERS.items():
        for case in table:
            dtypes = {
                c.dtype for c in seen if c.case is case and c.init == "Default" and c.backend == "dense"
            }
            assert {torch.float32, torch.bfloat16, torch.float64} <= dtypes, (type_name, case.name, dtypes)
    for init in cases.INITS:
        assert any(c.init == init for c in seen)
    for backend in cases.BACKENDS:
        assert any(c.backend == backend for c in seen)


def test_scaling_is_never_one() -> None:
    # A scaling of one would hide a forgotten one.
    for parameters in cases.EACH_CASE:
        layer = parameters.values[0].layer(trained=False)
        assert layer.scaling["default"] not in (0.0, 1.0)


def test_a_cover_has_every_pair_and_few_rows() -> None:
    rows = [row for row in itertools.product("abcd", range(3), "xyz", "pq") if row[0] != "a" or row[1] != 1]

    def pairs(rows: list[Row]) -> set[Row]:
        return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}

    chosen = pairwise(rows, first=rows[7:9])
    assert {*rows[7:9]} <= chosen <= {*rows} and len(chosen) < len(rows) / 3
    assert pairs(list(chosen)) == pairs(rows)
    assert pairwise([]) == set()
