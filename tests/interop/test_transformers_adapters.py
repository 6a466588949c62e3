"""Adapter methods of transformers' models: every module that holds a part of an adapter takes part."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.processes import run_python
from tests.tolerances import assert_close

HERE = Path(__file__).resolve().parent
REGISTER = "from veneer.as_peft import register_as_peft\nregister_as_peft()\n"
START = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import *
from peft import LoraConfig, PeftModel, get_peft_model
transformers.logging.disable_progress_bar()
place = Path(sys.argv[2])

def fill(model, name, seed=7):
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in f"{key}.":
            torch.nn.init.normal_(parameter, std=0.3)

def trainable(model):
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}
"""
VERBS = {
    "a module trained whole": 'dict(target_modules=["q_proj"], modules_to_save=["lm_head"])',
    "single tokens": 'dict(target_modules=["q_proj"], trainable_token_indices=[3, 4, 5])',
    "parameters": 'dict(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])',
    "DoRA": 'dict(target_modules=["q_proj"], use_dora=True)',
    "embedding": 'dict(target_modules=["q_proj", "embed_tokens"])',
}


def test_every_part_of_an_adapter_follows_every_verb(nopeft_python: Path, tmp_path: Path) -> None:
    """transformers by itself enables layers again, but not copies of modules."""
    run_python(
        REGISTER
        + START
        + f"VERBS = {{{', '.join(f'{name!r}: {options}' for name, options in VERBS.items())}}}\n"
        + """
base = llama()(X).logits
for why, options in VERBS.items():
    model = llama()
    model.add_adapter(LoraConfig(r=3, lora_alpha=7, **options), "one")
    mine = trainable(model)
    assert mine and all(".one" in key for key in mine), why
    fill(model, "one")
    model.eval()
    one = model(X).logits
    assert not torch.allclose(one, base), why
    model.disable_adapters()
    assert torch.equal(model(X).logits, base), why
    model.enable_adapters()
    assert torch.equal(model(X).logits, one), why

    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"]), "two")
    assert model.active_adapters() == ["two"]
    assert all(".two." in key for key in trainable(model)), why
    assert torch.equal(model(X).logits, base), why  # two has B = 0
    fill(model, "two")
    two = model(X).logits
    model.set_adapter(["one", "two"])
    assert model.active_adapters() == ["one", "two"] and mine < trainable(model), why
    assert not torch.allclose(model(X).logits, one) and not torch.allclose(model(X).logits, two), why
    model.set_adapter("one")
    assert torch.equal(model(X).logits, one) and trainable(model) == mine, why

    held = model.get_adapter_state_dict()
    assert held.keys() == model.get_adapter_state_dict("one").keys() != model.get_adapter_state_dict("two")
    folder = place / why
    model.save_pretrained(folder)
    written = load_file(folder / "adapter_model.safetensors")
    assert {f"base_model.model.{key}" for key in held} == set(written), why

    loaded = llama().train()
    loaded.load_adapter(str(folder))
    assert torch.equal(loaded(X).logits, one), why
    assert not trainable(loaded) and not loaded.training, why
    # The tensors are not those of the file, which may change now.
    save_file({key: value * 0 for key, value in written.items()}, folder / "adapter_model.safetensors",
              metadata={"format": "pt"})
    assert torch.equal(loaded(X).logits, one), why
    save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    again = llama().train()
    again.load_adapter(str(folder), "one", is_trainable=True)
    assert trainable(again) == mine and again.training, why
    assert torch.equal(again.eval()(X).logits, one), why

    model.delete_adapter("one")
    assert list(model.peft_config) == ["two"]
    model.set_adapter("two")
    assert torch.equal(model(X).logits, two), why
    model.delete_adapter(["two"])
    assert torch.equal(model(X).logits, base) and not model._hf_peft_config_loaded, why
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


def test_what_fails_leaves_the_model_as_it_was(nopeft_python: Path, tmp_path: Path) -> None:
    run_python(
        REGISTER
        + START
        + """
from veneer import AdapterNameError, TargetError, VeneerWarning
import warnings

def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)

model = llama()
config = LoraConfig(target_modules=["no_such_layer"], base_model_name_or_path="said by the caller")
raises(TargetError, lambda: model.add_adapter(config), "no_such_layer")
assert not model._hf_peft_config_loaded and "peft_config" not in vars(model)
raises(ValueError, lambda: model.set_adapter("default"), "No adapter loaded")
raises(ValueError, model.disable_adapters, "No adapter loaded")
raises(TypeError, lambda: model.add_adapter({"r": 4}), "PeftConfig")

head = dict(target_modules=["q_proj"], modules_to_save=["lm_head"])
config = LoraConfig(base_model_name_or_path="said by the caller", **head)
model.add_adapter(config, "one")
assert config.base_model_name_or_path == "said by the caller"
model.add_adapter(LoraConfig(**head), "two")
fill(model, "one")
fill(model, "two", seed=8)
before, wanted = model.eval()(X).logits, trainable(model)
# Two copies of one head cannot both answer: refused as a whole, not halfway through the layers.
raises(AdapterNameError, lambda: model.set_adapter(["one", "two"]), "only one")
raises(ValueError, lambda: model.set_adapter("three"), "'three'", "'one', 'two'")
raises(ValueError, lambda: model.add_adapter(LoraConfig(**head), "two"), "already exists")
raises(ValueError, lambda: model.delete_adapter(["one", "three"]), "three")
assert torch.equal(model(X).logits, before) and trainable(model) == wanted
assert model.active_adapters() == ["two"] and list(model.peft_config) == ["one", "two"]

biased = opt()
biased.add_adapter(LoraConfig(target_modules=["q_proj"], bias="lora_only"))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    biased.disable_adapters()
(said,) = [w for w in caught if issubclass(w.category, VeneerWarning)]
assert "bias='lora_only'" in str(said.message) and said.filename == "<string>"
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


def test_hot_swapping_takes_over_tensors_strength_and_rank(nopeft_python: Path, tmp_path: Path) -> None:
    """transformers alone exchanges the tensors and keeps the old strength."""
    run_python(
        REGISTER
        + START
        + """
from veneer import ConfigError, LoadMismatchError, PeftConfig, VeneerError
from veneer.testing.tolerances import assert_close

def adapter(name, r, alpha, seed, **options):
    model = get_peft_model(
        llama(), LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], **options)
    )
    fill(model, "default", seed)
    model.save_pretrained(place / name)
    return model.eval()(X).logits

wanted = {
    "a": adapter("a", 3, 7, 1), "b": adapter("b", 3, 20, 2), "smaller": adapter("smaller", 2, 4, 3,
    use_rslora=True), "larger": adapter("larger", 5, 4, 4), "dora": adapter("dora", 3, 4, 5, use_dora=True),
}

def factors(model):
    return {key: p for key, p in model.named_parameters() if "lora_" in key}

model = llama()
model.load_adapter(str(place / "a"), "x")
first = factors(model)
for name in ("b", "smaller", "a"):
    report = model.load_adapter(str(place / name), "x", hotswap=True)
    assert not (report.missing_keys or report.unexpected_keys or report.mismatched_keys)
    # A smaller rank is filled up with zeros, and a longer sum may be rounded in another order.
    logits = model(X).logits
    if name == "smaller":
        assert_close(logits, wanted[name])
    else:
        assert torch.equal(logits, wanted[name]), name
    assert all(p is first[key] for key, p in factors(model).items()), "in place"
    assert not trainable(model)
model.load_adapter(
    adapter_name="x", hotswap=True, peft_config=LoraConfig.from_pretrained(place / "b"),
    adapter_state_dict=load_file(place / "b" / "adapter_model.safetensors"),
)
assert torch.equal(model(X).logits, wanted["b"])
model.save_pretrained(place / "saved")
loaded = PeftModel.from_pretrained(llama(), place / "saved").eval()
assert torch.equal(loaded(X).logits, wanted["b"]), "the configuration says what the layers have"
for name, kind, word in (
    ("larger", LoadMismatchError, "enable_peft_hotswap"), ("dora", ConfigError, "use_dora")
):
    try:
        model.load_adapter(str(place / name), "x", hotswap=True)
    except kind as error:
        assert word in str(error), error
    else:
        raise AssertionError(name)
    assert torch.equal(model(X).logits, wanted["b"]), "nothing changed"
for why, call in {
    "another name": lambda: model.load_adapter(str(place / "a"), "y", hotswap=True),
    "no adapter yet": lambda: llama().load_adapter(str(place / "a"), "x", hotswap=True),
    "taken": lambda: model.load_adapter(str(place / "a"), "x"),
    "nothing given": lambda: model.load_adapter(adapter_name="x", hotswap=True),
    "no LoRA": lambda: model.load_adapter(
        adapter_name="x", hotswap=True, peft_config=PeftConfig(), adapter_state_dict={}
    ),
}.items():
    try:
        call()
    except ValueError:
        continue
    raise AssertionError(why)

# Prepared, any rank up to the largest, and without saying `hotswap=True`.
model = llama()
model.enable_peft_hotswap(target_rank=6)
model.load_adapter(str(place / "a"), "x")
first = factors(model)
assert {min(p.shape) for p in first.values()} == {6}
for name in ("a", "b", "larger", "smaller"):
    if name != "a":
        model.load_adapter(str(place / name), "x")
    assert_close(model(X).logits, wanted[name])
    assert all(p is first[key] for key, p in factors(model).items())
try:
    model.enable_peft_hotswap(target_rank=8)
except RuntimeError as error:
    assert "before loading the first adapter" in str(error)
else:
    raise AssertionError("prepared too late")

narrow = llama()
narrow.enable_peft_hotswap(target_rank=2)
before = {key: value.clone() for key, value in narrow.state_dict().items()}
try:
    narrow.load_adapter(str(place / "a"), "x")
except ConfigError as error:
    assert "target_rank=2 is below the rank" in str(error)
else:
    raise AssertionError("too narrow")
assert narrow.state_dict().keys() == before.keys() and not narrow._hf_peft_config_loaded
narrow.load_adapter(str(place / "smaller"), "x")
assert_close(narrow(X).logits, wanted["smaller"])
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


LIFE = """
steps, outputs = [], {}

def note(step, model):
    with torch.no_grad():
        outputs[step] = model(X).logits
    active = model.active_adapters() if model._hf_peft_config_loaded else None
    # Disabled factors take no part; that the reference freezes them meanwhile is not imitated.
    trains = None if step == "disabled" else sorted(trainable(model))
    steps.append([step, active, trains, model.training])

model = llama()
model.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]), "one")
fill(model, "one")
note("one added", model)
model.eval()
model.save_pretrained(place / "one")
model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj"], use_rslora=True), "two")
fill(model, "two")
note("two added", model)
model.set_adapter(["one", "two"])
note("both", model)
model.disable_adapters()
note("disabled", model)
model.enable_adapters()
note("enabled", model)
model.set_adapter("two")
model.save_pretrained(place / "two")
other = llama().train()
other.load_adapter(str(place / "two"), "loaded")
note("loaded", other)
other.load_adapter(str(place / "one"), "second", is_trainable=True)
note("second loaded", other)
other.delete_adapter("loaded")
note("first deleted", other)
model.delete_adapter(["one", "two"])
note("all deleted", model)
import json
torch.save(outputs, place / "outputs.pt")
(place / "steps.json").write_text(json.dumps(steps))
"""


def test_the_life_of_adapters_is_that_with_the_reference(nopeft_python: Path, tmp_path: Path) -> None:
    """The same script with the real peft and with Veneer: what is active, what trains, outputs, files."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    run_python(START + LIFE, HERE, theirs, python=sys.executable)
    run_python(REGISTER + START + LIFE, HERE, ours, python=nopeft_python)
    assert (ours / "steps.json").read_text() == (theirs / "steps.json").read_text()
    wanted, given = torch.load(theirs / "outputs.pt"), torch.load(ours / "outputs.pt")
    assert wanted.keys() == given.keys()
    for step, output in wanted.items():
        assert_close(given[step], output)
    for name in ("one", "two"):
        files = [load_file(place / name / "adapter_model.safetensors") for place in (theirs, ours)]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_tensors_and_configuration_are_of_one_save(nopeft_python: Path, tmp_path: Path) -> None:
    """A save that was cut short, and one that ends while transformers is between the two files."""
    run_python(
        REGISTER
        + START
        + """
import os, warnings
import peft
from veneer import AdapterFileError, VeneerWarning
from veneer.files.layout import CONFIG_NAME

def save(strength):
    model = get_peft_model(llama(), LoraConfig(r=3, lora_alpha=strength, target_modules=["q_proj"]))
    fill(model, "default", strength)
    model.save_pretrained(place)
    return model.eval()(X).logits

old, before = save(4), (place / CONFIG_NAME).read_bytes()
new = save(40)

# Cut short between the two moves: transformers finds the file of before.
(place / CONFIG_NAME).write_bytes(before)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = llama()
    model.load_adapter(str(place))
    assert torch.equal(model(X).logits, new)
    model.load_adapter(str(place), "default", hotswap=True)
    assert torch.equal(model(X).logits, new)
assert len([w for w in said if issubclass(w.category, VeneerWarning) and "cut short" in str(w.message)]) == 2

# Another save, after the configuration was read and before the tensors are.
save(4)
inject, saves = peft.inject_adapter_in_model, []
def between(*args, **kwargs):
    if not saves:
        saves.append(save(40))
    return inject(*args, **kwargs)
peft.inject_adapter_in_model = between
model = llama()
parameters = list(model.parameters())
model.load_adapter(str(place))
assert saves and torch.equal(model(X).logits, new)
assert model.peft_config["default"].lora_alpha == 40
assert all(any(p is q for q in model.parameters()) for p in parameters)

# One that saves each time.
def between(*args, **kwargs):
    save(4)
    return inject(*args, **kwargs)
peft.inject_adapter_in_model = between
model = llama()
before = model.state_dict()
try:
    model.load_adapter(str(place))
    raise AssertionError("loaded")
except AdapterFileError as error:
    assert "replaced again and again" in str(error)
assert model.state_dict().keys() == before.keys() and not getattr(model, "peft_config", None)
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )
