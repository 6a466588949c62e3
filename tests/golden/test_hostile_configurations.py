"""A hostile configuration ends quickly in one of Veneer's errors, whatever it contains."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from veneer import LoraConfig, PeftConfig, PeftModel, get_peft_model
from veneer.errors import ConfigError, VeneerError, VeneerWarning
from veneer.files.layout import SAFETENSORS_NAME

NESTED = "([a-z0-9._]+)+!"  # Python's own matcher needs years for it
LONG = "(a|b)*" * 170_000
PATTERNS: dict[str, Callable[[str], Any]] = {
    "target_modules": lambda p: ["q_proj", p],
    "exclude_modules": lambda p: p,
    "modules_to_save": lambda p: [p],
    "layers_pattern": lambda p: [p],
    "rank_pattern": lambda p: {p: 4},
    "alpha_pattern": lambda p: {p: 4},
    "trainable_token_indices": lambda p: {p: [1]},
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.q_proj(x) + self.k_proj(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Its paths are those of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return x  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    get_peft_model(net(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(path)
    # As other libraries write it: without a second copy of the configuration beside the tensors.
    save_file(load_file(path / SAFETENSORS_NAME), path / SAFETENSORS_NAME)
    return path


@pytest.fixture
def load(saved: Path, tmp_path: Path) -> Callable[[Any], Any]:
    """Load a good adapter with other options in its configuration, onto a model that stays as it was."""
    good = json.loads((saved / "adapter_config.json").read_text())
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def load(options: Any) -> Any:
        values = {**good, **options} if isinstance(options, dict) else options
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        model = net()
        before = {name: type(module) for name, module in model.named_modules()}
        try:
            return PeftModel.from_pretrained(model, tmp_path)
        except VeneerError as error:
            assert {name: type(module) for name, module in model.named_modules()} == before
            assert len(str(error)) < 3000 + 2 * len(str(tmp_path)), len(str(error))
            raise

    return load


def refused(load: Callable[[Any], Any], options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(options)
    return str(caught.value)


# --- patterns ---


@pytest.mark.parametrize(
    "option", [o for o in PATTERNS if o not in ("layers_pattern", "trainable_token_indices")]
)
def test_a_nested_repetition_matches_nothing_and_ends(load: Callable[[Any], Any], option: str) -> None:
    model = load({option: PATTERNS[option](NESTED)})
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2


def test_where_nothing_is_left_to_do_that_is_said(load: Callable[[Any], Any]) -> None:
    for option, more in (("layers_pattern", {"layers_to_transform": [0]}), ("trainable_token_indices", {})):
        with pytest.raises(VeneerError, match=r"\(\[a-z0-9\._\]\+\)\+!"):
            load({option: PATTERNS[option](NESTED), **more})


@pytest.mark.parametrize("option", PATTERNS)
def test_an_expression_of_a_megabyte(load: Callable[[Any], Any], option: str) -> None:
    message = refused(load, {option: PATTERNS[option](LONG), "layers_to_transform": [0]})
    assert f"{option} holds regular expressions (1, such as '(a|b)*(a|b)*" in message
    assert "a configuration may have 1,000 of 100,000 characters. List the modules by name" in message


@pytest.mark.parametrize("option", PATTERNS)
def test_fifty_thousand_expressions(load: Callable[[Any], Any], option: str) -> None:
    many = [rf".*layers\.{i}\..*x" for i in range(50_000)]
    whole = dict.fromkeys(many, [1] if option.startswith("train") else 4)
    given = whole if isinstance(PATTERNS[option](""), dict) else many
    message = refused(load, {option: given, "layers_to_transform": [0]})
    assert f"{option} holds regular expressions (50,000, such as '.*layers" in message


@pytest.mark.parametrize("option", PATTERNS)
def test_what_takes_too_many_steps_is_named(load: Callable[[Any], Any], option: str) -> None:
    deep = "(?:" * 20 + ".{2}" + ")+.?)+" * 10 + "|.*_proj.?x"
    given = PATTERNS[option](f"(?:{'|'.join([deep] * 40)})")
    message = refused(load, {option: given, "layers_to_transform": [0]})
    assert f"{option}: '(?:(?:(?:(?:" in message
    assert "has too many ways to match" in message
    assert "name the modules instead" in message


@pytest.mark.parametrize("option", [*PATTERNS, "target_parameters"])
def test_names_in_any_number_of_an_honest_file(load: Callable[[Any], Any], option: str) -> None:
    many = [f"model.layers.{i}.experts" for i in range(20_000)]
    whole = dict.fromkeys(many, [1] if option.startswith("train") else 4)
    given = whole if isinstance(PATTERNS.get(option, list)(""), dict) else many
    if option in ("trainable_token_indices", "layers_pattern"):
        with pytest.raises(VeneerError, match=r"model\.layers\.0\.experts"):
            load({option: given, "layers_to_transform": [0]})
    else:
        load({option: [*many, "q_proj"] if option == "target_modules" else given})


def test_more_patterns_than_any_file_has(load: Callable[[Any], Any]) -> None:
    message = refused(load, {"modules_to_save": ["x"] * 250_000})
    assert "modules_to_save holds 250,000 patterns, such as 'x': all in all there are 250,001" in message


def test_the_same_in_python() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern holds regular expressions \(2,000, such as"):
        LoraConfig(rank_pattern={f".*{i}": 4 for i in range(2_000)})
    get_peft_model(net(), LoraConfig(r=2, target_modules=["q_proj", r"(.*)*k_pro.?"]))
    with pytest.warns(
        VeneerWarning, match=r"rank_pattern '\(\[a-z0-9\._\]\+\)\+!' matches no adapted module"
    ):
        get_peft_model(net(), LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={NESTED: 4}))
    with pytest.raises(ConfigError, match=r"modules_to_save: '\(' is not a valid regular expression"):
        LoraConfig(modules_to_save=["("])


# --- layers ---


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ([[0, 2]] * 10_000, "makes 20,000 layers of the 2 here; at most 100 are built"),
        ([1], "layer_replication must be a list of pairs [start, end] or None, got [1]"),
        ([[0, 1], None], "layer_replication must be a list of pairs [start, end] or None"),
        ([[0, 10**400]], "is not [start, end] with 0 <= start < end <= 2"),
        ([[0.0, 1]], "layer_replication must be a list of pairs"),
        ({"0": 1}, "layer_replication must be a list of pairs"),
    ],
    ids=["many", "number", "null", "large", "float", "table"],
)
def test_replications_that_are_none(load: Callable[[Any], Any], ranges: Any, says: str) -> None:
    assert says in refused(load, {"layer_replication": ranges})


# --- values ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"trainable_token_indices": {"embed_tokens": 5}},
            "trainable_token_indices['embed_tokens'] must be a list",
        ),
        (
            {"trainable_token_indices": {"x": 5}},
            "trainable_token_indices['x'] must be a list of whole numbers",
        ),
        (
            {"trainable_token_indices": [1.5]},
            "trainable_token_indices must be a list of whole numbers from 0",
        ),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must be a list of whole numbers from 0"),
        ({"alora_invocation_tokens": ["a"]}, "alora_invocation_tokens must be a list of whole numbers"),
        ({"modules_to_save": ["("]}, "modules_to_save: '(' is not a valid regular expression"),
        ({"lora_alpha": 1e39}, "lora_alpha must be a finite number above 0 in float32, got 1e+39"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number above 0"),
        ({"lora_alpha": 1e-50}, "lora_alpha must be a finite number above 0 in float32, got 1e-50"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number above 0"),
        ({"alpha_pattern": {"q_proj": 1e39}}, "alpha_pattern['q_proj'] must be a finite number above 0"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern['q_proj'] must be a finite number above 0"),
        ({"rank_pattern": {"q_proj": 10**12}}, "rank_pattern['q_proj'] must be an integer from 1 to 1048576"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern['q_proj'] must be an integer"),
        ({"r": 10**12}, "r must be an integer from 1 to 1048576"),
        ({"lora_dropout": float("nan")}, "lora_dropout must be a number from 0 to 1"),
        ({"lora_dropout": 1e39}, "lora_dropout must be a number from 0 to 1"),
        (
            {"init_lora_weights": "eva", "eva_config": {"rho": 1e300}},
            "eva_config.rho must be a number from 1",
        ),
    ],
)
def test_values_that_cannot_be(load: Callable[[Any], Any], options: dict[str, Any], says: str) -> None:
    assert says in refused(load, options)


# --- anything ---

#: Values that readers tend to fall over, and names that stand in the model.
ODD = [None, True, False, 0, -1, 2, 2**31, 10**30, 0.5, -0.0, 1e39, float("nan"), float("inf"), "", "q_proj"]
WORDS = [
    "q_proj",
    "norm",
    "layers",
    "embed_tokens",
    "all-linear",
    "(",
    ".*",
    r".*\.k_proj",
    "(a+)+!",
    "\ud800",
    "x" * 300,
]
scalars = st.one_of(
    st.sampled_from(ODD), st.sampled_from(WORDS), st.integers(), st.floats(), st.text(max_size=5)
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=3)), inner, max_size=3),
    ),
    max_leaves=6,
)
names = sorted(f.name for f in dataclasses.fields(LoraConfig) if f.init)
options = st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=8)), anything, max_size=3)


def attempt(read: Callable[[], Any]) -> None:
    """Nothing but success, a warning or an error of Veneer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of Python, for expressions like [[a]
        try:
            read()
        except VeneerError as error:
            assert len(str(error)) < 5000


@hypothesis.given(st.one_of(options, anything))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(content))
    attempt(lambda: LoraConfig.from_file(file))
    if isinstance(content, dict):
        file.write_text(json.dumps({"peft_type": "LORA", **content}))
        attempt(lambda: LoraConfig.from_file(file))


@hypothesis.given(options)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_whatever_a_good_adapter_is_given(load: Callable[[Any], Any], content: dict[str, Any]) -> None:
    attempt(lambda: load(content))


# --- long texts ---

LONG_TEXT = "y" * 10_000


@pytest.mark.parametrize(
    "options",
    [
        {"variant": LONG_TEXT},
        {"peft_version": f"9.9.9{LONG_TEXT}"},
        {"peft_type": LONG_TEXT},
        {"init_lora_weights": LONG_TEXT},
        {LONG_TEXT: 1},
        {"target_modules": LONG_TEXT},
        {"modules_to_save": [LONG_TEXT]},
        {"trainable_token_indices": {LONG_TEXT: [1]}},
        {"alora_invocation_tokens": [1] * 10_000},
    ],
)
def test_no_message_quotes_a_long_text_of_a_file(load: Callable[[Any], Any], options: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        message = ""
        try:
            load(options)
        except VeneerError as error:
            message = str(error)
    assert all(LONG_TEXT[:300] not in text for text in (message, *(str(w.message) for w in caught)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: LoraConfig(**{LONG_TEXT: 1}),
        lambda: get_peft_model(net(), LoraConfig(target_modules=["q_proj"]), LONG_TEXT),
        lambda: get_peft_model(net(), LoraConfig(target_modules=["q_proj"])).set_adapter(LONG_TEXT),
        lambda: get_peft_model(net(), LoraConfig(target_modules=["q_proj"])).delete_adapter(LONG_TEXT),
        lambda: PeftModel.from_pretrained(net(), LONG_TEXT),
        lambda: PeftModel.from_pretrained(net(), ".", **{LONG_TEXT: 1}),
        lambda: PeftModel.from_pretrained(net(), f"./{LONG_TEXT}"),
        lambda: PeftConfig.from_pretrained(f"./{LONG_TEXT}"),
        lambda: LoraConfig.from_file(f"./{LONG_TEXT}"),
        lambda: LoraConfig.from_file("a\0b"),
    ],
    ids="option new-adapter adapter deleted repository keyword path configuration file null-byte".split(),
)
def test_no_message_quotes_a_long_text_of_a_caller(call: Callable[[], Any]) -> None:
    with pytest.raises(VeneerError) as caught:
        call()
    assert LONG_TEXT[:300] not in str(caught.value)
