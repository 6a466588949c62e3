"""TRL's trainers with a Veneer adapter, through every door: trained, saved, loaded, merged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import run_python
from tests.tolerances import TRAINING, assert_close

HERE = Path(__file__).resolve().parent

#: The environment, and what is imported before anything else.
DOORS = {
    "as_peft, peft absent": ("without", "from veneer.as_peft import register_as_peft\nregister_as_peft()"),
    "peft absent": ("without", "import veneer"),
    "peft and TRL first": ("with", "import peft\nfrom trl import SFTTrainer\nimport veneer"),
}
START = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny import *
from tiny_trl import *
place = Path(sys.argv[2])
"""


def run(first: str, code: str, place: Path, python: str | Path = sys.executable) -> str:
    return run_python(f"{first}\n{START}{code}", HERE, place, python=python).stdout


@pytest.mark.parametrize("door", DOORS)
def test_trainers_train_and_save_the_adapter(door: str, nopeft_python: Path, tmp_path: Path) -> None:
    """At DPO's first step policy and reference are one: the loss is ln 2 where the reference is right."""
    kind, first = DOORS[door]
    out = run(
        first,
        """
import math
check_trained(sft(place / "sft", llama(), peft_config=config()), llama)
check_trained(sft(place / "sft-ready", get_peft_model(llama(), config())), llama)

for name, model, more in (
    ("fresh", llama(), {"peft_config": config()}),
    ("ready", ready(llama()), {}),
):
    trainer = check_trained(dpo(place / f"dpo-{name}", model, **more), llama)
    assert trainer.ref_model is None
    assert sorted(trainer.model.peft_config) == (["default"] if more else ["default", "ref"])
    losses = history(trainer)
    assert abs(losses[0] - math.log(2)) < 1e-6 and losses[1] < losses[0], losses
    model = llama() if more else ready(llama())
    trainer = check_trained(online("GRPO", place / f"grpo-{name}", model, **more), llama)
    divergence = history(trainer, "kl")
    assert divergence[0] == 0 and divergence[1] > 0, divergence

scored = config(task_type="SEQ_CLS", modules_to_save=["score"])
check_trained(reward(place / "reward", reward_model(), peft_config=scored), reward_model)
""",
        tmp_path,
        sys.executable if kind == "with" else nopeft_python,
    )
    assert out.count("trained: ") == 7


def test_trl_imported_first_where_peft_is_absent(nopeft_python: Path, tmp_path: Path) -> None:
    """Its modules found no peft, and get what they lack: names to test against, a version to ask for."""
    out = run(
        "from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer\nimport veneer",
        """
from trl import ModelConfig, get_peft_config
made = get_peft_config(ModelConfig(use_peft=True, lora_r=4, lora_target_modules=["q_proj", "down_proj"]))
assert type(made) is LoraConfig and get_peft_config(ModelConfig()) is None
check_trained(dpo(place / "dpo", ready(llama())), llama)
check_trained(kto(place / "kto", ready(llama())), llama)
check_trained(kto(place / "kto-fresh", llama(), peft_config=made), llama)
check_trained(online("RLOO", place / "rloo", ready(llama())), llama)
check_trained(online("RLOO", place / "rloo-fresh", llama(), peft_config=made), llama)
""",
        tmp_path,
        nopeft_python,
    )
    assert out.count("trained: ") == 5


def test_reference_adapter_stays_and_comes_back_with_a_checkpoint(tmp_path: Path) -> None:
    """TRL's adapter "ref" is a copy of the one given; saved beside it, and there again when resumed."""
    run(
        "import veneer",
        """
def losses(name, resume=None, **options):
    trainer = dpo(place / name, ready(llama()), {"max_steps": 4, "save_steps": 2, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, history(trainer)

trainer, whole = losses("whole")
given = dict(ready(llama()).named_parameters())
copies = {n: p for n, p in trainer.model.named_parameters() if ".ref." in n}
assert len(copies) == 8
for name, parameter in copies.items():
    assert not parameter.requires_grad
    assert torch.equal(parameter, given[name.replace(".ref.", ".default.")]), name
assert trainer.model.active_adapter == "default"

checkpoint = place / "whole" / "checkpoint-2"
assert (checkpoint / "ref" / "adapter_model.safetensors").is_file()
_, again = losses("resumed", checkpoint)
assert again == whole, (again, whole)
_, before = losses("precomputed", precompute_ref_log_probs=True)
assert_close(torch.tensor(before), torch.tensor(whole))
""",
        tmp_path,
    )


def test_adapter_of_a_base_on_disk_and_activation_checkpointing(tmp_path: Path) -> None:
    """The usual script: the base by its name, the adapter by its configuration, loaded by its directory."""
    run(
        "import peft, veneer",
        """
from veneer import AutoPeftModelForCausalLM
llama().save_pretrained(place / "base")
runs = {}
for kept in (False, True):
    trainer = sft(
        place / f"out-{kept}", str(place / "base"), {"activation_checkpointing": kept}, peft_config=config()
    )
    trainer.train()
    runs[kept] = history(trainer)
assert runs[True] == runs[False], runs
trainer.save_model(place / "final")
assert not list((place / "final").glob("model*"))
loaded = AutoPeftModelForCausalLM.from_pretrained(place / "final")
assert torch.equal(outputs(loaded), outputs(trainer.model))
theirs = peft.AutoPeftModelForCausalLM.from_pretrained(place / "final")
assert_close(outputs(theirs), outputs(trainer.model))
""",
        tmp_path,
    )


def test_both_libraries_train_alike_and_side_by_side(tmp_path: Path) -> None:
    """From the same adapter, with either library: the same losses. TRL's own refusals hold for ours too."""
    out = run(
        "import peft\nfrom trl import SFTTrainer\nimport veneer",
        """
import json
from peft.tuners.tuners_utils import BaseTunerLayer
from veneer.layers import LoraLayer
import trl.trainer.dpo_trainer as module

ready(llama()).save_pretrained(place / "start")
ready(reward_model(), task_type="SEQ_CLS", modules_to_save=["score"]).save_pretrained(place / "scored")
for make, base, start in ((sft, llama, "start"), (dpo, llama, "start"), (reward, reward_model, "scored")):
    losses = {}
    for library in (peft, veneer):
        model = library.PeftModel.from_pretrained(base(), place / start, is_trainable=True)
        options = {"max_steps": 4, "learning_rate": 1e-3}
        trainer = make(place / f"{make.__name__}-{library.__name__}", model, options)
        assert isinstance(trainer.model, library.PeftModel)
        trainer.train()
        losses[library.__name__] = history(trainer)
    print("losses:", json.dumps(losses))

theirs = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
assert isinstance(sft(place / "theirs", llama(), peft_config=theirs).model, peft.PeftModel)
# What is widened is what TRL's module asks, not the library.
assert issubclass(LoraLayer, module.BaseTunerLayer) and not issubclass(LoraLayer, BaseTunerLayer)
assert module.LoraConfig is peft.LoraConfig

def refused(words, *arguments, **more):
    try:
        dpo(place / "refused", *arguments, **more)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)

refused("`PeftModel` instance together with a `peft_config`", ready(llama()), peft_config=config())
refused("adapter to `lm_head` is not supported", llama(), peft_config=config(target_modules=["lm_head"]))
""",
        tmp_path,
    )
    found = [json.loads(line.removeprefix("losses:")) for line in out.splitlines() if "losses:" in line]
    assert len(found) == 3
    for losses in found:
        ours, theirs = (torch.tensor(losses[library]) for library in ("veneer", "peft"))
        assert len(ours) == 4 and ours[0] != ours[-1]
        assert_close(ours, theirs, TRAINING)


def test_weights_that_are_sent_to_vllm_are_those_of_the_merged_model(tmp_path: Path) -> None:
    """TRL merges, reads parameters by their names, and unmerges: the names must become the base's again."""
    run(
        "import veneer",
        """
from contextlib import nullcontext
from types import SimpleNamespace
from trl.generation.vllm_generation import VLLMGeneration
model = ready(llama(), modules_to_save=["lm_head"])
wanted, before = outputs(model), {n: p.clone() for n, p in model.named_parameters()}
sender = VLLMGeneration.__new__(VLLMGeneration)
sender.model = model
sender._dist = SimpleNamespace(gather_params=lambda parameters: nullcontext(), is_fsdp=False)
sent = {name: value.clone() for name, value in sender._iter_named_params()}
assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
receiver = llama()
receiver.load_state_dict(sent)
assert_close(outputs(receiver), wanted)
assert not torch.equal(outputs(llama()), wanted)
""",
        tmp_path,
    )
