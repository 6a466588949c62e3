"""Which modules an adapter takes, and what is said about patterns that change nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from veneer.config import LoraConfig
from veneer.config.expressions import Paths
from veneer.errors import ConfigError, TargetError, VeneerWarning
from veneer.module_names import portable_targets
from veneer.spec import PatternSet
from veneer.targets import (
    DEFAULT_TARGETS,
    Candidate,
    Plan,
    head_names,
    layer_index,
    plan,
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def decoder(layers: int = 4, prefix: str = "model.", *extra: Candidate) -> list[Candidate]:
    """The modules of a small decoder, in the order of named_modules()."""
    found = [Candidate("", "Model", False), Candidate(f"{prefix}embed_tokens", "Embedding", True)]
    for i in range(layers):
        layer = f"{prefix}layers.{i}"
        found.append(Candidate(layer, "Layer", False))
        for block, names in (("self_attn", ATTENTION), ("mlp", MLP)):
            found.append(Candidate(f"{layer}.{block}", block.title(), False))
            found += [Candidate(f"{layer}.{block}.{name}", "Linear", True, linear=True) for name in names]
        found.append(Candidate(f"{layer}.norm", "RMSNorm", False, reason="it has no weight matrix"))
    head = Candidate("lm_head", "Linear", True, linear=True, output_head=True)
    return [*found, *extra, head]


def chosen(candidates: list[Candidate] | None = None, **options: Any) -> list[str]:
    return [spec.path for spec in plan(candidates or decoder(), LoraConfig(**options)).specs]


def said(candidates: list[Candidate] | None = None, **options: Any) -> tuple[Plan, str]:
    with pytest.warns(VeneerWarning) as caught:
        made = plan(candidates or decoder(), LoraConfig(**options))
    assert len(caught) == 1
    return made, str(caught[0].message)


def refused(candidates: list[Candidate] | None = None, **options: Any) -> str:
    with pytest.raises(TargetError) as caught:
        plan(candidates or decoder(), LoraConfig(**options))
    return str(caught.value)


# --- the one rule ---


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q", "q", True),
        ("q", "a.q", True),
        ("q", "a.xq", False),
        ("q", "q.a", False),
        ("attn.q", "a.attn.q", True),
        ("attn.q", "a.xattn.q", False),
        ("attn.q", "attnxq", False),
        (r".*\.(q|v)", "a.v", True),
        (r".*\.(q|v)", "a.vv", False),
        (r"(q|v)", "a.q", False),
        ("^a.q$", "a.q", True),
        ("^a.q$", "b.a.q", False),
        ("we+ird", "a.we+ird", True),
    ],
)
def test_matches(pattern: str, path: str, expected: bool) -> None:
    assert bool(PatternSet([pattern], "target_modules").over(Paths([path]))[path]) is expected
    others = [Candidate("other", "Linear", True, linear=True), Candidate(path, "Linear", True, linear=True)]
    made = plan(others, LoraConfig(target_modules=["other", pattern]), loading=True)
    assert (path in [spec.path for spec in made.specs]) is expected


@pytest.mark.parametrize(
    "names", ["q_proj", ["q_proj"], ("q_proj",), {"q_proj"}, r".*\.q_proj", [r".*\.q_proj"]]
)
def test_a_name_alone_and_in_a_list_mean_the_same(names: Any) -> None:
    assert chosen(target_modules=names) == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]


def test_specs_keep_the_models_order() -> None:
    expected = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(4) for n in "qv"]
    assert chosen(target_modules=["v_proj", "q_proj"]) == expected


def test_the_field_matches_the_same_modules() -> None:
    from peft import LoraConfig as FieldConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    cases: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": r".*layers\.[02]\..*_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.2\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["model.layers.3.self_attn.q_proj", "v_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": [*MLP, "lm_head"]},
    ]
    candidates = decoder()
    for case in cases:
        field = FieldConfig(**case)
        found = {c.path: check_target_module_exists(field, c.path) for c in candidates if c.path}
        theirs = [path for path, hit in found.items() if hit is True or isinstance(hit, re.Match)]
        assert chosen(candidates, **case) == theirs, case
        assert theirs, case


# --- "all-linear" ---


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR", ["all-linear"]])
def test_all_linear_takes_neither_head_nor_containers(spelling: Any) -> None:
    expected = [
        f"model.layers.{i}.{b}.{n}"
        for i in range(4)
        for b, names in (("self_attn", ATTENTION), ("mlp", MLP))
        for n in names
    ]
    assert chosen(target_modules=spelling) == expected


def test_the_head_is_taken_by_name() -> None:
    assert chosen(target_modules=["lm_head"]) == ["lm_head"]


def test_all_linear_leaves_modules_to_save_alone() -> None:
    inside = Candidate("classifier.dense", "Linear", True, linear=True)
    candidates = decoder(1, "model.", Candidate("classifier", "Head", False), inside)
    made = plan(candidates, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert "classifier.dense" not in [s.path for s in made.specs]
    assert made.modules_to_save == ("classifier",)
    assert "classifier.dense" in [s.path for s in made.skipped]


def test_all_linear_says_nothing_of_a_head_that_every_adapter_trains_its_own_copy_of() -> None:
    head = Candidate("classifier", "Linear", False, linear=True, reason="'first' trains it whole")
    candidates = decoder(1, "model.", head)
    made = plan(candidates, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"), "second")
    assert made.modules_to_save == ("classifier",) and not made.unmatched
    with pytest.warns(VeneerWarning, match="'first' trains it whole"):
        plan(candidates, LoraConfig(target_modules="all-linear"), "second")


def test_a_linear_layer_that_all_linear_cannot_take_is_said() -> None:
    odd = Candidate("odd", "Linear9bit", False, linear=True, reason="nine bits are too many")
    _, message = said(decoder(1, "model.", odd), target_modules="all-linear")
    assert "odd (Linear9bit): nine bits are too many" in message


# --- what cannot be adapted ---


def test_named_targets_that_cannot_be_adapted_are_all_refused() -> None:
    lstm = Candidate("rnn", "LSTM", False, reason="its weights are not one matrix")
    message = refused(decoder(5, "model.", lstm), target_modules=["q_proj", "rnn", "norm", "v_porj"])
    assert "rnn (LSTM): its weights are not one matrix" in message
    assert "model.layers.0.norm, model.layers.1.norm, model.layers.2.norm and 2 more (RMSNorm)" in message
    assert "v_porj" in message


def test_an_expression_passes_over_what_cannot_be_adapted_and_says_so() -> None:
    made, message = said(target_modules=r".*layers\.0\.(norm|self_attn\..*)")
    assert [s.path for s in made.specs] == [f"model.layers.0.self_attn.{n}" for n in ATTENTION]
    assert "model.layers.0.norm (RMSNorm): it has no weight matrix" in message


def test_an_expression_passes_over_containers_in_silence() -> None:
    made = plan(decoder(1), LoraConfig(target_modules=r".*self_attn.*"))
    assert len(made.specs) == 4
    assert [(s.path, s.reason) for s in made.skipped] == [
        ("model.layers.0.self_attn", "Self_Attn only holds other modules")
    ]


def test_a_container_alone_names_what_is_inside() -> None:
    message = refused(target_modules=["self_attn"])
    assert "model.layers.0.self_attn (Self_Attn) and 3 more like it" in message
    assert "q_proj, k_proj, v_proj, o_proj" in message


# --- patterns that match nothing ---


def test_nothing_matched_lists_the_nearest_names_and_the_linear_layers() -> None:
    message = refused(target_modules=["q_porj", "Down_Proj"])
    assert "target_modules 'q_porj' matches nothing; nearest names: q_proj" in message
    assert "target_modules 'Down_Proj' matches nothing; nearest names: down_proj" in message
    assert "gate_proj (4)" in message
    assert "lm_head" not in message


def test_every_idle_pattern_is_said_in_one_warning() -> None:
    made, message = said(
        target_modules=["q_proj", "v_porj"],
        exclude_modules=["layers.9.mlp"],
        modules_to_save=["lmhead"],
        rank_pattern={"q_prj": 4},
        alpha_pattern={"down_proj": 4},
        layers_to_transform=[0, 3, 7, 8],
    )
    assert [(u.field, u.pattern) for u in made.unmatched] == [
        ("modules_to_save", "lmhead"),
        ("exclude_modules", "layers.9.mlp"),
        ("target_modules", "v_porj"),
        ("layers_to_transform", "7-8"),
        ("rank_pattern", "q_prj"),
        ("alpha_pattern", "down_proj"),
    ]
    assert made.unmatched[0].suggestions == ("lm_head",)
    assert made.unmatched[2].suggestions == ("v_proj",)
    assert "targets lie in layers 0-3" in message
    assert "such as model.layers.0.mlp.down_proj, but none that is adapted" in message
    assert all(u.pattern in message for u in made.unmatched)


def test_strict_targets_raises_for_one_idle_pattern() -> None:
    config = LoraConfig(target_modules=["q_proj", "v_porj"])
    with pytest.raises(TargetError, match=r"v_porj.*v_proj"):
        plan(decoder(), config, strict_targets=True)


def test_idle_patterns_of_a_loaded_adapter_are_recorded_in_silence() -> None:
    made = plan(decoder(), LoraConfig(target_modules=["q_proj", "c_attn"]), loading=True)
    assert [u.pattern for u in made.unmatched] == ["c_attn"]


def test_words_of_an_expression_are_looked_up() -> None:
    assert "nearest names: q_proj" in refused(target_modules=r".*\.(q_porj)")


def test_everything_excluded_says_by_what() -> None:
    assert "excluded by 'self_attn.q_proj'" in refused(
        target_modules=["q_proj"], exclude_modules=["self_attn.q_proj"]
    )


def test_an_assigned_value_is_checked_too() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    config.r = 0
    with pytest.raises(ConfigError, match="r must be"):
        plan(decoder(), config)


# --- layers ---


@pytest.mark.parametrize("prefix", ["", "model.", "base.model."])
@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
def test_layers_to_transform(prefix: str, pattern: Any) -> None:
    got = chosen(
        decoder(4, prefix), target_modules="q_proj", layers_to_transform=[1, 3], layers_pattern=pattern
    )
    assert got == [f"{prefix}layers.{i}.self_attn.q_proj" for i in (1, 3)]


def test_unknown_names_of_layers_work() -> None:
    candidates = [Candidate(f"net.stages.{i}.lin", "Linear", True, linear=True) for i in range(3)]
    assert chosen(candidates, target_modules=["lin"], layers_to_transform=2) == ["net.stages.2.lin"]
    assert chosen(candidates, target_modules="all-linear", layers_to_transform=0) == ["net.stages.0.lin"]


def test_an_empty_list_of_layers_means_all() -> None:
    assert len(chosen(target_modules=["q_proj"], layers_to_transform=[])) == 4


def test_a_wrong_layers_pattern_names_the_right_one() -> None:
    message = refused(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layer")
    assert "layers_pattern 'layer' precedes no numbered layer; nearest names: layers" in message


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("layers.3.q", 3),
        ("m.layers.12.experts.4.w", 12),
        ("h.0.attn.c_attn", 0),
        ("q", None),
        ("layers.3", None),
        ("0.blocks.7.q", 7),
        ("3d.5.q", 5),
    ],
)
def test_layer_index(path: str, index: int | None) -> None:
    assert layer_index(path) == index


# --- modules that train in full ---


def classifier_model(*heads: str) -> list[Candidate]:
    return [*decoder(1)[:-1], *(Candidate(head, "Linear", True, linear=True) for head in heads)]


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("SEQ_CLS", "score"),
        ("SEQ_CLS", "classifier"),
        ("TOKEN_CLS", "classifier"),
        ("QUESTION_ANS", "qa_outputs"),
    ],
)
def test_heads_join_by_themselves(task: str, head: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type=task)
    assert plan(classifier_model(head), config).modules_to_save == (head,)
    assert config.modules_to_save is None
    assert head in head_names(task)


def test_a_task_without_its_head_is_said() -> None:
    _, message = said(target_modules=["q_proj"], task_type="SEQ_CLS")
    assert "'classifier or score' is the head that trains along for task SEQ_CLS" in message


def test_both_heads_of_a_file_raise_no_complaint() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["classifier", "score"]
    )
    assert plan(classifier_model("score"), config).modules_to_save == ("score",)


def test_other_tasks_have_no_head() -> None:
    assert head_names("CAUSAL_LM") == head_names(None) == ()


def test_a_module_inside_a_saved_one_is_not_saved_twice() -> None:
    made = plan(decoder(1), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]))
    assert made.modules_to_save == ("model.layers.0.mlp",)
    assert made.skipped[0].path == "model.layers.0.mlp.up_proj"


def test_targeted_and_saved_by_the_same_name_is_refused_but_loads() -> None:
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["embed_tokens"],
    }
    assert "model.embed_tokens is named by both" in refused(**options)
    made = plan(decoder(1), LoraConfig(**options), loading=True)
    assert made.modules_to_save == ("model.embed_tokens",)
    assert [s.path for s in made.specs] == ["model.layers.0.self_attn.q_proj"]


# --- defaults by model type ---


def test_defaults_equal_the_fields() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    for model_type, names in theirs.items():
        ours = DEFAULT_TARGETS[model_type]
        assert (ours if isinstance(names, str) else set(ours)) == (
            names if isinstance(names, str) else set(names)
        )


def test_defaults_are_used_and_not_complained_about() -> None:
    made = plan(decoder(2), LoraConfig(), model_type="phi")
    assert [s.path for s in made.specs] == [
        f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"
    ]
    assert made.unmatched == ()


@pytest.mark.parametrize("model_type", [None, "never_heard_of"])
def test_an_unknown_model_type_lists_the_linear_layers(model_type: str | None) -> None:
    with pytest.raises(TargetError, match=r"all-linear.*q_proj \(4\), k_proj \(4\)"):
        plan(decoder(), LoraConfig(), model_type=model_type)


def test_defaults_that_do_not_fit_are_said() -> None:
    with pytest.raises(TargetError, match="target_modules 'c_attn' matches nothing"):
        plan(decoder(), LoraConfig(), model_type="gpt2")


# --- the plan ---


def test_ranks_and_strengths_follow_the_patterns() -> None:
    config = LoraConfig(
        r=8,
        target_modules=["q_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={r"layers\.[23]\..*": 32},
    )
    assert [(s.r, s.scaling) for s in plan(decoder(), config).specs] == [
        (8, 1.0),
        (2, 4.0),
        (8, 4.0),
        (8, 4.0),
    ]


def test_the_table_of_a_plan() -> None:
    with pytest.warns(VeneerWarning):
        made = plan(
            decoder(),
            LoraConfig(
                target_modules=["q_proj", "up_proj", "oops"],
                modules_to_save=["lm_head"],
                rank_pattern={"up_proj": 4},
            ),
            "mine",
        )
    lines = str(made).splitlines()
    assert lines[0] == "adapter 'mine': 8 modules"
    assert lines[1].split() == ["pattern", "modules", "layers", "r", "scale", "example"]
    assert lines[2].split() == ["oops", "0"]
    assert lines[3].split() == ["q_proj", "4", "0-3", "8", "1", "model.layers.0.self_attn.q_proj"]
    assert lines[4].split() == ["up_proj", "4", "0-3", "4", "2", "model.layers.0.mlp.up_proj"]
    assert lines[5] == "trained in full: lm_head"
    assert "oops" in lines[6]
    assert hash(made) == hash(made)


def test_the_callers_config_is_not_written() -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    before = config.to_dict()
    plan(classifier_model("score"), config)
    assert config.to_dict() == before


def test_portable_targets_are_the_shortest_names() -> None:
    candidates = decoder()
    targets = chosen(candidates, target_modules="all-linear")
    others = [c.path for c in candidates if c.path not in targets]
    assert portable_targets(targets, others) == {*ATTENTION, *MLP}
    some = chosen(candidates, target_modules=["q_proj"], layers_to_transform=[1])
    names = portable_targets(some, [c.path for c in candidates if c.path not in some])
    assert names == {"1.self_attn.q_proj"}
    assert chosen(candidates, target_modules=names) == some
