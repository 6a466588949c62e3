from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.adapters import check_adapter_name
from veneer.errors import AdapterNameError
from veneer.files.keys import to_disk

ROOT = "base_model.model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("memory", "disk"),
    [
        (f"{ROOT}.lora_A.default.weight", f"{ROOT}.lora_A.weight"),
        (f"{ROOT}.lora_B.default.weight", f"{ROOT}.lora_B.weight"),
        (f"{ROOT}.lora_B.default.bias", f"{ROOT}.lora_B.bias"),
        (f"{ROOT}.lora_embedding_A.default", f"{ROOT}.lora_embedding_A"),
        (f"{ROOT}.lora_embedding_B.default", f"{ROOT}.lora_embedding_B"),
        (f"{ROOT}.lora_magnitude_vector.default.weight", f"{ROOT}.lora_magnitude_vector"),
        (f"{ROOT}.lora_magnitude_vector.default", f"{ROOT}.lora_magnitude_vector"),
        (
            f"{ROOT}.token_adapter.trainable_tokens_delta.default",
            f"{ROOT}.token_adapter.trainable_tokens_delta",
        ),
        ("base_model.model.score.modules_to_save.default.weight", "base_model.model.score.weight"),
        ("score.modules_to_save.default.dense.out.bias", "score.dense.out.bias"),
        (f"{ROOT}.base_layer.bias", f"{ROOT}.base_layer.bias"),
        (
            "base_model.model.embed_tokens.base_layer.weight",
            "base_model.model.embed_tokens.base_layer.weight",
        ),
        ("base_model.model.norm.bias", "base_model.model.norm.bias"),
        # The adapter's name and the factors' names as names of the user's own modules.
        ("default.lora_A.lora_A.default.weight", "default.lora_A.lora_A.weight"),
        ("lora_A.default.lora_B.default.weight", "lora_A.default.lora_B.weight"),
        ("modules_to_save.default.fc.lora_A.default.weight", "modules_to_save.default.fc.lora_A.weight"),
        ("default.score.modules_to_save.default.weight", "default.score.weight"),
        # Another adapter's tensors are nobody's business.
        (f"{ROOT}.lora_A.other.weight", f"{ROOT}.lora_A.other.weight"),
        ("lora_A.default.weight", "lora_A.weight"),
        ("default", "default"),
        ("", ""),
    ],
)
def test_table_of_key_rules(memory: str, disk: str) -> None:
    assert to_disk(memory, "default") == disk


SEGMENTS = st.sampled_from(
    ["lora_A", "lora_B", "lora_embedding_A", "weight", "bias", "a", "b", "0", "base_layer"]
)
LEAVES = {
    "linear": [".lora_A.{}.weight", ".lora_B.{}.weight", ".lora_B.{}.bias", ".base_layer.bias"],
    "embedding": [".lora_embedding_A.{}", ".lora_embedding_B.{}", ".base_layer.weight"],
    "dora": [".lora_A.{}.weight", ".lora_B.{}.weight", ".lora_magnitude_vector.{}.weight"],
    "saved": [".modules_to_save.{}.weight", ".modules_to_save.{}.bias", ".modules_to_save.{}.a.lora_A"],
    "plain": [".bias"],
}


@st.composite
def models(draw: st.DrawFn) -> list[str]:
    """Names in memory of one adapter, called "a" as some modules are, in a model of wrappers."""
    paths = draw(
        st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=8, unique=True)
    )
    # A wrapper has no other children than its own: nothing lies below another module of the list.
    apart = [p for p in paths if not any(p != q and p[: len(q)] == q for q in paths)]
    kinds = draw(st.lists(st.sampled_from(sorted(LEAVES)), min_size=len(apart), max_size=len(apart)))
    return [
        ".".join(p) + leaf.format("a") for p, kind in zip(apart, kinds, strict=True) for leaf in LEAVES[kind]
    ]


@given(models())
def test_no_two_tensors_of_an_adapter_share_a_name_on_disk(names: list[str]) -> None:
    assert len({to_disk(n, "a") for n in names}) == len(set(names))


@given(
    st.lists(SEGMENTS, max_size=4),
    st.sampled_from(sorted(LEAVES)),
    st.sampled_from(["x", "y_2", "lora_A", "0"]),
)
def test_the_name_on_disk_does_not_depend_on_the_adapter(path: list[str], kind: str, adapter: str) -> None:
    for leaf in LEAVES[kind]:
        stem = ".".join(["m", *path, "m"])
        assert to_disk(stem + leaf.format(adapter), adapter) == to_disk(stem + leaf.format("other"), "other")


@pytest.mark.parametrize("name", ["default", "my adapter", "ref-2", "日本", "x" * 100])
def test_adapter_names(name: str) -> None:
    check_adapter_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "../x", "/etc", "a.b", "a\0b", "keys", "forward", 3]
)
def test_refused_adapter_names(name: str) -> None:
    with pytest.raises(AdapterNameError, match="cannot be the name"):
        check_adapter_name(name)
