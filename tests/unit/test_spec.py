"""What one module gets from one adapter."""

from __future__ import annotations

import dataclasses
import math
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from veneer.config import LoftQConfig, LoraConfig
from veneer.config.expressions import Paths
from veneer.errors import ConfigError
from veneer.spec import LoraSpec, PatternSet, resolve, variant_name

PATH = "model.layers.1.self_attn.q_proj"


def test_the_scale_is_alpha_over_r() -> None:
    assert LoraSpec("m", "a", r=16, lora_alpha=8).scaling == 0.5


def test_the_scale_of_rslora_is_alpha_over_the_root_of_r() -> None:
    assert LoraSpec("m", "a", r=16, lora_alpha=8, use_rslora=True).scaling == 8 / math.sqrt(16) == 2.0


def test_rank_zero_is_impossible() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        LoraSpec("m", "a", r=0, lora_alpha=8)


def test_a_strength_that_float32_cannot_hold_is_impossible() -> None:
    with pytest.raises(ConfigError, match=r"lora_alpha is 3e\+38, r is 1"):
        LoraSpec("m", "a", r=1, lora_alpha=3e38, times=2)


def test_a_spec_is_frozen_and_hashable() -> None:
    spec = LoraSpec("m", "a", r=2, lora_alpha=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.r = 3  # type: ignore[misc]
    assert {spec: 1}[LoraSpec("m", "a", 2, 8)] == 1


def test_resolve_takes_every_option_over() -> None:
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True, lora_bias=True)
    assert resolve(config, "mine", PATH) == LoraSpec(
        PATH, "mine", r=4, lora_alpha=6, lora_dropout=0.1, init=True, use_rslora=True, lora_bias=True
    )


@pytest.mark.parametrize(
    ("keys", "rank"),
    [
        ({"q_proj": 2}, 2),
        ({"self_attn.q_proj": 2}, 2),
        ({PATH: 2}, 2),
        ({"^" + PATH: 2}, 2),
        ({"^self_attn.q_proj": 2}, 8),
        ({"proj": 2}, 8),
        ({"attn.q_proj": 2}, 8),
        ({r"layers\.[01]\..*": 2}, 2),
        ({r"layers\.[02]\..*": 2}, 8),
        ({r"q_proj|v_proj": 2}, 2),
        ({"k_proj": 3, "q_proj": 2, PATH: 5}, 2),
        ({PATH: 5, "q_proj": 2}, 5),
        ({r".*": 7, "q_proj": 2}, 7),
        ({"q_proj": 2, r".*": 7}, 2),
        ({r"self_attn\.q_proj$": 2}, 2),
    ],
)
def test_the_first_matching_rank_pattern_wins_as_in_the_field(keys: dict[str, int], rank: int) -> None:
    from peft.utils.other import get_pattern_key

    assert resolve(LoraConfig(rank_pattern=keys), "a", PATH).r == rank
    assert keys.get(get_pattern_key(list(keys), PATH), 8) == rank


def test_alpha_patterns_are_their_own() -> None:
    config = LoraConfig(r=8, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 32, "q_proj": 2.5})
    spec = resolve(config, "a", PATH)
    assert (spec.r, spec.lora_alpha, spec.scaling) == (4, 2.5, 0.625)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (True, True),
        (False, False),
        ("gaussian", "gaussian"),
        ("Gaussian", "gaussian"),
        ("pissa_niter_4", "pissa_niter_4"),
    ],
)
def test_the_name_of_the_initialisation(given: bool | str, name: bool | str) -> None:
    assert resolve(LoraConfig(init_lora_weights=given), "a", PATH).init == name


def test_loftq_options_come_along_with_loftq_only() -> None:
    config = LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 2})
    assert resolve(config, "a", PATH).init_config == LoftQConfig(loftq_bits=2, loftq_iter=1)
    assert resolve(LoraConfig(loftq_config=LoftQConfig(2)), "a", PATH).init_config is None


def test_variant_names() -> None:
    assert variant_name(LoraConfig()) == "plain"
    assert variant_name(LoraConfig(use_dora=True)) == "dora"
    assert resolve(LoraConfig(use_dora=True), "a", PATH).variant == "dora"
    assert variant_name(LoraConfig(alora_invocation_tokens=[1, 2])) == "alora"
    with pytest.raises(ConfigError, match="dora, qalora cannot be combined"):
        variant_name(LoraConfig(use_dora=True, use_qalora=True))


segment = st.sampled_from(["q", "v", "layers", "0", "1", "attn"])
dotted = st.lists(segment, min_size=1, max_size=4).map(".".join)
expression = st.sampled_from([r".*q", r"layers\.\d+\.q", r"(q|v)", r"^layers\.0\.q$", "^layers.0.q", r"[qv]"])


@hypothesis.given(st.lists(st.one_of(dotted, expression), unique=True, max_size=5), dotted)
def test_lookup_agrees_with_trying_every_pattern(patterns: list[str], path: str) -> None:
    def whole(pattern: str) -> bool:
        return path == pattern or path.endswith("." + pattern) or re.fullmatch(pattern, path) is not None

    def anywhere(pattern: str) -> bool:
        return path.endswith("." + pattern) or re.match(rf"(.*\.)?({pattern})$", path) is not None

    assert PatternSet(patterns, "target_modules").over(Paths([path]))[path] == [
        i for i, p in enumerate(patterns) if whole(p)
    ]
    assert PatternSet(patterns, "rank_pattern", anywhere=True).over(Paths([path]))[path] == [
        i for i, p in enumerate(patterns) if anywhere(p)
    ]
