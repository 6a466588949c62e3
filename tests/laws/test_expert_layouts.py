"""Between any two layouts of experts, ΔW of every expert stays, and every tensor is accounted for."""

from __future__ import annotations

import re

import pytest
import torch

from tests.laws.expert_layouts import (
    EXPERTS,
    HIDDEN,
    HOLDERS,
    MIXTURES,
    Deltas,
    R,
    deltas,
    factors,
    plain_config,
    read,
    scaling,
)
from tests.tolerances import EXPERTS_DELTA, EXPERTS_ROUNDED, assert_close
from veneer.errors import ExportError
from veneer.expert_layouts.converting import Converted, convert
from veneer.expert_layouts.layouts import LAYOUTS, Layout
from veneer.expert_layouts.mixture import Mixture

QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def written(layout: Layout, kind: str, mixture: Mixture) -> Converted:
    """An adapter in a layout, made from factors in that of transformers 4, which is read off without any."""
    tensors = {QUERY.format("A"): torch.ones(R, HIDDEN), QUERY.format("B"): torch.full((HIDDEN, R), 2.0)}
    for holder, parts in factors(kind).items():
        for part, made in parts.items():
            whole = made.expanded()
            for expert in range(EXPERTS):
                tensors[f"{holder}.{expert}.{part}.lora_A.weight"] = whole.a[expert]
                tensors[f"{holder}.{expert}.{part}.lora_B.weight"] = whole.b[expert]
    return convert(plain_config(), tensors, LAYOUTS["transformers-4"], layout, mixture)


def same(found: Deltas, wanted: Deltas) -> None:
    """Equal up to the order of a sum of r products in float64."""
    assert found.keys() == wanted.keys()
    for place, delta in found.items():
        assert_close(delta, wanted[place], EXPERTS_DELTA)


def taking(kind: str) -> dict[str, Layout]:
    """The layouts that have a place for factors of a kind."""
    return {name: row for name, row in LAYOUTS.items() if row.shared != "outer" or kind == "shared"}


@pytest.mark.parametrize("kind", ["plain", "shared"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("source", LAYOUTS)
def test_updates_stay(source: str, mixture: str, kind: str) -> None:
    base, targets = MIXTURES[mixture], taking(kind)
    if source not in targets:
        with pytest.raises(ExportError, match="has another lora_A for every expert"):
            written(LAYOUTS[source], kind, base)
        return
    before, wanted = written(LAYOUTS[source], kind, base), deltas(factors(kind))
    same(read(source, base, before.config, before.tensors), wanted)
    for name, target in targets.items():
        after = convert(before.config, before.tensors, LAYOUTS[source], target, base)
        same(read(name, base, after.config, after.tensors), wanted)
        others = {key: t for key, t in after.tensors.items() if ".experts" not in key}
        query = QUERY if name != "tinker" or mixture != "gpt_oss" else QUERY.replace("self_attn", "attn")
        assert others.keys() == {query.format("A"), query.format("B")}
        assert torch.equal(others[query.format("A")], torch.ones(R, HIDDEN))
        assert torch.equal(others[query.format("B")], torch.full((HIDDEN, R), 2.0))
        assert scaling(after.config, "model.layers.0.self_attn.q_proj") == 4.0


@pytest.mark.parametrize("kind", ["plain", "one_a"])
@pytest.mark.parametrize("name", [name for name, row in LAYOUTS.items() if row.shared != "outer"])
def test_and_back(name: str, kind: str) -> None:
    """Written and read again, factors are bit for bit what they were."""
    mixture, first = MIXTURES["qwen3_moe"], written(LAYOUTS["transformers-4"], kind, MIXTURES["qwen3_moe"])
    there = convert(first.config, first.tensors, LAYOUTS["transformers-4"], LAYOUTS[name], mixture)
    back = convert(there.config, there.tensors, LAYOUTS[name], LAYOUTS["transformers-4"], mixture)
    same(read("transformers-4", mixture, back.config, back.tensors), deltas(factors(kind)))
    if LAYOUTS[name].one_a and kind == "plain":
        return  # gate and up got the A of both
    assert back.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in first.tensors.items())
    assert (back.config.r, back.config.lora_alpha) == (first.config.r, first.config.lora_alpha)


def test_a_difference_in_strength_costs_one_rounding() -> None:
    """Gate and up of other strengths, joined: B of up is multiplied by their ratio, and rounded once."""
    mixture, first = MIXTURES["qwen3_moe"], written(LAYOUTS["transformers-4"], "plain", MIXTURES["qwen3_moe"])
    config = plain_config(alpha_pattern={"up_proj": 3 * R})
    after = convert(config, first.tensors, LAYOUTS["transformers-4"], LAYOUTS["peft"], mixture)
    wanted = read("transformers-4", mixture, config, first.tensors)
    for place, delta in read("peft", mixture, after.config, after.tensors).items():
        close = EXPERTS_ROUNDED if place[1] == "up_proj" else EXPERTS_DELTA
        assert_close(delta, wanted[place], close)


REFUSED = {
    "both factors are shared": ("tinker", {"w2.lora_A": 1, "w2.lora_B": 1}),
    "have no product": ("tinker", {"w2.lora_A": 3}),
    "lora_B is missing": ("tinker", {"w2.lora_B": None}),
    "the numbers of experts differ": ("tinker", {"w2.lora_A": 2, "w2.lora_B": 2}),
    "the factors of experts are missing: 1 (lora_A)": ("transformers-4", {"1.down_proj.lora_A": None}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_read(reason: str) -> None:
    """Every layer is named, and nothing is converted."""
    name, changes = REFUSED[reason]
    mixture, file = MIXTURES["qwen3_moe"], written(LAYOUTS[name], "plain", MIXTURES["qwen3_moe"])
    for holder in HOLDERS:
        for part, count in changes.items():
            key = f"{holder}.{part}.weight"
            if count is None:
                del file.tensors[key]
            else:
                file.tensors[key] = file.tensors[key][:count]
    with pytest.raises(ExportError, match=re.escape(reason)) as error:
        convert(file.config, file.tensors, LAYOUTS[name], LAYOUTS["peft"], mixture)
    assert all(holder in str(error.value) for holder in HOLDERS)
