"""`load_adapter` of plain transformers models, Veneer in the place of peft."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import run_python

HERE = Path(__file__).resolve().parent
START = """
import sys
sys.path.insert(0, sys.argv[1])
from veneer.as_peft import register_as_peft
register_as_peft()
import shutil, warnings
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import *
from veneer import LoraConfig, PeftModel, VeneerError, get_peft_model
transformers.logging.disable_progress_bar()
place = Path(sys.argv[2])
"""


@pytest.fixture(params=["peft absent", "peft installed"])
def python(request: pytest.FixtureRequest) -> str:
    absent = request.param == "peft absent"
    return str(request.getfixturevalue("nopeft_python") if absent else sys.executable)


def test_outputs_are_those_of_our_own_loading(python: str, tmp_path: Path) -> None:
    """From a directory and from a state dict; among the models an OPT with projections at its embeddings."""
    run_python(
        START
        + """
cases = [
    (llama, dict(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj", "embed_tokens"],
                 modules_to_save=["lm_head"])),
    (opt, dict(task_type="CAUSAL_LM", target_modules=["q_proj", "fc1", "project_in", "project_out"])),
    (gpt2, dict(task_type="CAUSAL_LM", target_modules=["c_attn", "wte"], use_rslora=True)),
    (llama, dict(target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 5},
                 alpha_pattern={"up_proj": 3}, lora_bias=True)),
    (opt, dict(target_modules=["v_proj", "fc2"], bias="lora_only")),
    (classifier, dict(task_type="SEQ_CLS", target_modules=["query", "dense"])),
]
for number, (make, options) in enumerate(cases):
    trained = get_peft_model(make(), LoraConfig(r=3, lora_alpha=7, **options))
    shake(trained)
    trained.eval()
    wanted = trained(X).logits
    folder = place / str(number)
    trained.save_pretrained(folder)

    plain = make()
    base = plain(X).logits
    report = plain.load_adapter(str(folder))
    assert not (report.unexpected_keys or report.mismatched_keys)
    assert torch.equal(plain(X).logits, wanted), (number, (plain(X).logits - wanted).abs().max())
    assert not torch.allclose(wanted, base)
    assert torch.equal(PeftModel.from_pretrained(make(), folder).eval()(X).logits, wanted)
    plain.disable_adapters()
    if options.get("bias", "none") == "none":
        assert torch.equal(plain(X).logits, base)

    from_memory = make()
    from_memory.load_adapter(
        adapter_state_dict=load_file(folder / "adapter_model.safetensors"),
        peft_config=LoraConfig.from_pretrained(folder),
    )
    assert torch.equal(from_memory(X).logits, wanted), number
""",
        HERE,
        tmp_path,
        python=python,
    )


def test_what_does_not_fit_raises_and_changes_nothing(nopeft_python: Path, tmp_path: Path) -> None:
    run_python(
        START
        + """
def adapter(name, layers=2, hidden=16):
    model = get_peft_model(
        llama(layers, hidden), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    )
    shake(model)
    model.save_pretrained(place / name)
    return place / name

good = adapter("good")

def changed(name, change):
    shutil.copytree(good, place / name)
    file = place / name / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return place / name

inside = "base_model.model."
extra = f"{inside}model.layers.7.self_attn.q_proj.lora_A.weight"
bad = {
    "all keys wrong": (
        changed("prefix", lambda t: {k.replace(inside, "elsewhere."): v for k, v in t.items()}),
        ["8 keys match nothing", "of the adapter's 8 tensors", "elsewhere.model.layers.0", "Not one tensor"],
    ),
    "some missing": (
        changed("missing", lambda t: dict(list(t.items())[2:])),
        ["2 of the adapter's 8 tensors", "Part of it"],
    ),
    "one too many": (
        changed("extra", lambda t: {**t, extra: torch.zeros(3, 16)}),
        ["1 keys match nothing", "layers.7"],
    ),
    "deeper": (adapter("deeper", layers=4), ["layers.2", "other depth"]),
    "wider": (
        adapter("wider", hidden=32),
        ["another shape", "(3, 32), expected (3, 16)", "wider or narrower"],
    ),
}

def state(model):
    noted = {k: vars(model).get(k) for k in ("peft_config", "_hf_peft_config_loaded", "_weight_conversions")}
    noted["peft_config"] = dict(noted["peft_config"] or {})
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: (type(m), m.training) for n, m in model.named_modules()},
        noted,
    )

def same(one, two):
    return (
        list(one[0]) == list(two[0])
        and all(torch.equal(one[0][k], two[0][k]) for k in one[0])
        and one[1:] == two[1:]
    )

for why, (folder, words) in bad.items():
    for first in (False, True):
        for name in ("default", "a"):
            model = llama()
            if first:
                model.load_adapter(str(good), "first")
            model.train()
            before = state(model)
            try:
                model.load_adapter(str(folder), name)
            except VeneerError as error:
                assert type(error).__name__ == "LoadMismatchError"
                for word in [*words, "the model is as before", str(folder)]:
                    assert word in str(error), (why, word, str(error))
            else:
                raise AssertionError(why)
            assert same(before, state(model)), (why, first, name)
    # And the right one can still be loaded after it.
    model.load_adapter(str(good), "a")

# A base tensor in the file, an embedding's, is taken back too.
model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"]))
model.get_parameter("base_model.model.model.embed_tokens.base_layer.weight").data += 1
shake(model)
model.save_pretrained(place / "embedding", save_embedding_layers=True)
file = place / "embedding" / "adapter_model.safetensors"
held = load_file(file)
assert any(key.endswith("embed_tokens.base_layer.weight") for key in held)
save_file({**held, extra: torch.zeros(3, 16)}, file, metadata={"format": "pt"})
model = llama()
before, pointer = state(model), model.get_input_embeddings().weight
try:
    model.load_adapter(str(place / "embedding"))
except VeneerError as error:
    assert "layers.7" in str(error)
else:
    raise AssertionError("embedding")
assert same(before, state(model)) and model.get_input_embeddings().weight is pointer

state_dict = {f"no.{k}": v for k, v in load_file(good / "adapter_model.safetensors").items()}
try:
    llama().load_adapter(adapter_state_dict=state_dict, peft_config=LoraConfig.from_pretrained(good))
except VeneerError as error:
    assert "the state dict does not fit" in str(error)
else:
    raise AssertionError("state dict")
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


def test_the_life_of_adapters_in_a_plain_model(nopeft_python: Path, tmp_path: Path) -> None:
    """add, set, disable, enable, delete, save, and loading base and adapter from one call."""
    run_python(
        START
        + """
llama().save_pretrained(place / "base")
base = llama()(X).logits
model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
model.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]), "one")
assert model.active_adapters() == ["one"]
assert {n for n, p in model.named_parameters() if p.requires_grad} == {
    n for n, _ in model.named_parameters() if "lora_" in n
}
shake(model)
model.eval()
one = model(X).logits
assert not torch.allclose(one, base)
model.save_pretrained(place / "adapter")
assert sorted(p.name for p in (place / "adapter").iterdir() if "generation" not in p.name) == [
    "adapter_config.json", "adapter_model.safetensors"
]
assert all(".lora_" in k for k in load_file(place / "adapter" / "adapter_model.safetensors"))

again = transformers.AutoModelForCausalLM.from_pretrained(place / "adapter")
assert torch.equal(again(X).logits, one)
ours = PeftModel.from_pretrained(llama(), place / "adapter").eval()
assert torch.equal(ours(X).logits, one)
shutil.copytree(place / "adapter", place / "half")
file = place / "half" / "adapter_model.safetensors"
save_file(dict(list(load_file(file).items())[:2]), file, metadata={"format": "pt"})
try:
    transformers.AutoModelForCausalLM.from_pretrained(place / "half")
except VeneerError as error:
    assert "2 of the adapter's 4 tensors were not given" in str(error)
else:
    raise AssertionError("half an adapter")

model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"]), "two")
shake(model)
model.eval()
model.set_adapter(["one", "two"])
assert model.active_adapters() == ["one", "two"]
both = model(X).logits
model.set_adapter("one")
assert model.active_adapters() == ["one"]
assert not torch.allclose(model(X).logits, both)
model.disable_adapters()
assert torch.equal(model(X).logits, base)
model.enable_adapters()
model.delete_adapter("two")
assert list(model.peft_config) == ["one"]
for key, value in model.get_adapter_state_dict("one").items():
    assert key.endswith(("lora_A.weight", "lora_B.weight"))
model.delete_adapter("one")
assert torch.equal(model(X).logits, base)
for wrong in ("two", "three"):
    try:
        model.set_adapter(wrong)
    except ValueError:
        continue
    raise AssertionError(wrong)
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )
