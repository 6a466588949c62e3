"""transformers' Trainer with a Veneer model: what it saves, what it resumes, through which door."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import run_python
from tests.tolerances import TRAINING_BF16, assert_close

HERE = Path(__file__).resolve().parent

#: The environment, and what is imported before a model is made.
DOORS = {
    "peft installed, veneer first": ("with", "import veneer"),
    "peft and the trainer first": ("with", "import peft, transformers.trainer\nimport veneer"),
    "peft absent": ("without", "import veneer"),
    "peft absent, the trainer first": (
        "without",
        "import transformers.trainer, trl.trainer.sft_trainer\nimport veneer",
    ),
    "as_peft, peft absent": ("without", "from veneer.as_peft import register_as_peft\nregister_as_peft()"),
    "as_peft, peft installed": ("with", "from veneer.as_peft import register_as_peft\nregister_as_peft()"),
}

TRAIN = """
import json
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny import *
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from veneer import LoraConfig, PeftModel, get_peft_model
transformers.logging.disable_progress_bar()

def run(out, resume=None, make=llama, **options):
    torch.manual_seed(5)
    model = get_peft_model(
        make(),
        LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=32, lora_dropout=0.1,
            target_modules=["q_proj", "down_proj"],
        ),
    )
    options = {"save_steps": 4, "max_steps": 8, "learning_rate": 0.05, **options}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(out), per_device_train_batch_size=4, logging_steps=1, seed=3,
            report_to=[], disable_tqdm=True, use_cpu=True, **options,
        ),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
"""


def interpreter(kind: str, nopeft_python: Path) -> str:
    return sys.executable if kind == "with" else str(nopeft_python)


@pytest.mark.parametrize("door", DOORS)
def test_checkpoints_hold_the_adapter_and_resume_continues(
    door: str, nopeft_python: Path, tmp_path: Path
) -> None:
    kind, first = DOORS[door]
    run_python(
        f"{first}\n{TRAIN}"
        + """
place = Path(sys.argv[2])
trainer, losses = run(place / "whole")
assert losses[-1] < losses[0] - 0.3, losses
for folder in (place / "whole" / "checkpoint-4", place / "whole" / "checkpoint-8"):
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= names, names
    assert not [n for n in names if n.startswith(("model", "pytorch_model"))], names
    held = load_file(folder / "adapter_model.safetensors")
    assert len(held) == 8 and all(".lora_" in key for key in held), sorted(held)
trainer.save_model(place / "final")
assert (place / "final" / "adapter_model.safetensors").is_file()
assert not list((place / "final").glob("model*"))
loaded = PeftModel.from_pretrained(llama(), place / "final").eval()
assert torch.equal(loaded(X).logits, trainer.model.eval()(X).logits)

_, again = run(place / "resumed", place / "whole" / "checkpoint-4")
# transformers keeps the history of the first steps in the checkpoint.
assert again == losses, (again, losses)
""",
        HERE,
        tmp_path,
        python=interpreter(kind, nopeft_python),
    )


def test_resume_in_another_process_continues_the_same_losses(nopeft_python: Path, tmp_path: Path) -> None:
    def losses(*more: str) -> list[float]:
        code = f"import veneer\n{TRAIN}\nprint(json.dumps(run(*map(Path, sys.argv[2:]))[1]))"
        done = run_python(code, HERE, *more, python=nopeft_python)
        found: list[float] = json.loads(done.stdout.splitlines()[-1])
        return found

    whole = losses(str(tmp_path / "whole"))
    resumed = losses(str(tmp_path / "resumed"), str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed == whole
    assert len(whole) == 8 and whole[-1] < whole[0]


TWO_DOORS = ("peft and the trainer first", "as_peft, peft absent")


@pytest.mark.parametrize("door", TWO_DOORS)
def test_best_model_evaluation_and_label_smoothing(door: str, nopeft_python: Path, tmp_path: Path) -> None:
    """The best checkpoint comes back, here the first; the base's own loss and signature are found."""
    kind, first = DOORS[door]
    run_python(
        f"{first}\n{TRAIN}"
        + """
place = Path(sys.argv[2])
trainer, losses = run(
    place, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
    metric_for_best_model="eval_loss", greater_is_better=True, label_smoothing_factor=0.1,
)
history = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
assert list(history) == [2, 4, 6, 8] and max(history, key=history.get) == 2, history
assert trainer.state.best_model_checkpoint == str(place / "checkpoint-2")
kept = load_file(place / "checkpoint-2" / "adapter_model.safetensors")
last = load_file(place / "checkpoint-8" / "adapter_model.safetensors")
from veneer import get_peft_model_state_dict
now = get_peft_model_state_dict(trainer.model)
assert kept.keys() == now.keys() and all(torch.equal(kept[k], now[k]) for k in kept)
assert not all(torch.equal(last[k], now[k]) for k in kept)
assert trainer.model.active_adapters == ["default"]
assert trainer.label_names == ["labels"] and "attention_mask" in trainer._signature_columns
assert trainer.evaluate()["eval_loss"] == history[2]
_, plain = run(place / "plain")
assert plain[0] != losses[0], "label smoothing changes the loss"
""",
        HERE,
        tmp_path,
        python=interpreter(kind, nopeft_python),
    )


@pytest.mark.parametrize("door", TWO_DOORS)
def test_gradient_checkpointing_and_half_precision(door: str, nopeft_python: Path, tmp_path: Path) -> None:
    """Recomputing, reentrant or not, gives the same losses; autocast gives those of its precision."""
    kind, first = DOORS[door]
    done = run_python(
        f"{first}\n{TRAIN}"
        + """
from veneer import get_peft_model_state_dict
place = Path(sys.argv[2])
options = dict(save_strategy="no", max_steps=4)

def outcome(**more):
    trainer, losses = run(place, **options, **more)
    return losses, get_peft_model_state_dict(trainer.model), trainer

losses, adapter, _ = outcome()
for reentrant in (True, False):
    kwargs = {"use_reentrant": reentrant}
    again, other, trainer = outcome(
        activation_checkpointing=True, activation_checkpointing_kwargs=kwargs
    )
    assert trainer.model.is_activation_checkpointing
    assert again == losses, (reentrant, again, losses)
    assert all(torch.equal(adapter[k], other[k]) for k in adapter), reentrant

rates = dict(learning_rate=1e-3)
_, plain = run(place, **options, **rates)
bf16, half, trainer = outcome(bf16=True, **rates)
assert bf16 != plain, "nothing was computed in bf16"
assert all(value.dtype == torch.float32 for value in half.values())
of_bf16, half, trainer = outcome(make=lambda: llama().to(torch.bfloat16), **rates)
assert trainer.model.get_base_model().dtype == torch.bfloat16
assert all(value.dtype == torch.float32 for value in half.values())
print(json.dumps([plain, bf16, of_bf16]))
""",
        HERE,
        tmp_path,
        python=interpreter(kind, nopeft_python),
    )
    plain, *others = json.loads(done.stdout.splitlines()[-1])
    for losses in others:
        assert_close(torch.tensor(losses), torch.tensor(plain), TRAINING_BF16)


def test_fp16_autocast(nopeft_python: Path) -> None:
    """Trainer's `fp16=True` computes in float32 on a CPU; torch's autocast does not, so it is used itself."""
    done = run_python(
        """
import sys
sys.path.insert(0, sys.argv[1])
import json
from tiny import *
from veneer import LoraConfig, get_peft_model

def losses(dtype):
    torch.manual_seed(5)
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            output = model(input_ids=X, labels=X)
        assert output.logits.dtype == (dtype or torch.float32), output.logits.dtype
        # What GradScaler does on a GPU: small gradients are not lost in 16 bits.
        (output.loss * 256).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
                parameter.grad /= 256
        optimizer.step()
        optimizer.zero_grad()
        found.append(output.loss.item())
    return found

print(json.dumps([losses(None), losses(torch.float16), losses(torch.bfloat16)]))
""",
        HERE,
        python=nopeft_python,
    )
    plain, fp16, bf16 = json.loads(done.stdout.splitlines()[-1])
    assert fp16 != plain and plain[-1] < plain[0] and fp16[-1] < fp16[0]
    assert_close(torch.tensor(fp16), torch.tensor(plain), TRAINING_BF16)
    assert_close(torch.tensor(bf16), torch.tensor(plain), TRAINING_BF16)


def test_checkpointing_of_images_trains_the_factors(tmp_path: Path) -> None:
    """A model of pixels has no embedding of ids whose output transformers would let require a gradient."""
    run_python(
        f"import veneer\n{TRAIN}"
        + """
def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_labels=3, initializer_range=0.3,
    ))

def pictures():
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 3)} for i in range(12)]

def train(**options):
    torch.manual_seed(5)
    model = get_peft_model(vit(), LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    ))
    trainer = Trainer(model=model, train_dataset=pictures(), args=TrainingArguments(
        sys.argv[2], per_device_train_batch_size=4, logging_steps=1, learning_rate=0.02, max_steps=4,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", **options,
    ))
    trainer.train()
    moved = {n: p.abs().sum().item() for n, p in model.named_parameters() if ".lora_B." in n}
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], moved

losses, moved = train()
assert len(moved) == 4 and all(moved.values())
for reentrant in (True, False):
    kwargs = {"use_reentrant": reentrant}
    again = train(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    assert again == (losses, moved), (reentrant, again, losses)

plain = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
assert not hasattr(plain, "activation_checkpointing_enable")
""",
        HERE,
        tmp_path,
    )


def test_generating_while_evaluating(nopeft_python: Path, tmp_path: Path) -> None:
    """Seq2SeqTrainer with `predict_with_generate`, and resuming its checkpoint."""
    run_python(
        f"{DOORS['as_peft, peft absent'][1]}\n{TRAIN}"
        + """
from tiny_tasks import t5
place = Path(sys.argv[2])

def run(out, resume=None):
    torch.manual_seed(5)
    model = get_peft_model(t5(), LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=32, lora_dropout=0.1, target_modules=["q", "wo"]
    ))
    trainer = transformers.Seq2SeqTrainer(
        model=model, train_dataset=rows(), eval_dataset=rows(4),
        args=transformers.Seq2SeqTrainingArguments(
            str(place / out), per_device_train_batch_size=4, logging_steps=1, learning_rate=0.02, seed=3,
            max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
            predict_with_generate=True, generation_max_length=6, eval_strategy="steps", eval_steps=4,
        ),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

trainer, losses = run("whole")
assert losses[-1] < losses[0]
predicted = trainer.predict(rows(4)).predictions
wanted = trainer.model.eval().generate(
    input_ids=torch.stack([row["input_ids"] for row in rows(4)]), max_length=6
)
assert (predicted[:, : wanted.shape[1]] == wanted.numpy()).all(), (predicted, wanted)
_, again = run("resumed", place / "whole" / "checkpoint-2")
assert again == losses, (again, losses)
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


def test_an_adapter_of_the_model_s_own(nopeft_python: Path, tmp_path: Path) -> None:
    """`model.add_adapter`, then Trainer: checkpoints hold the adapter, and load everywhere."""
    run_python(
        f"{DOORS['as_peft, peft absent'][1]}\n{TRAIN}"
        + """
place = Path(sys.argv[2])
torch.manual_seed(5)
model = llama()
model.add_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"]))
trainer = Trainer(model=model, train_dataset=rows(), args=TrainingArguments(
    str(place), per_device_train_batch_size=4, logging_steps=1, learning_rate=0.05, max_steps=4, save_steps=4,
    report_to=[], disable_tqdm=True, use_cpu=True, activation_checkpointing=True,
    activation_checkpointing_kwargs={"use_reentrant": True},
))
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0] - 0.1, losses
folder = place / "checkpoint-4"
assert not list(folder.glob("model*")) and (folder / "adapter_model.safetensors").is_file()
output = model.eval()(X).logits
assert torch.equal(PeftModel.from_pretrained(llama(), folder).eval()(X).logits, output)
loaded = llama()
loaded.load_adapter(str(folder))
assert torch.equal(loaded(X).logits, output)
""",
        HERE,
        tmp_path,
        python=nopeft_python,
    )


def test_models_of_the_real_library_are_treated_as_before(tmp_path: Path) -> None:
    """Beside Veneer's, in one process: what is tested against is widened, not replaced."""
    run_python(
        """
import peft
import veneer
from veneer.integrations.transformers import enable_trainer
"""
        + TRAIN
        + """
import transformers.trainer, transformers.trainer_utils
from accelerate.utils import is_peft_model
place = Path(sys.argv[2])

enable_trainer()
before = (transformers.trainer.PeftModel, transformers.trainer_utils.PeftModel, is_peft_model)
enable_trainer()
veneer.integrations.watch()
assert before == (transformers.trainer.PeftModel, transformers.trainer_utils.PeftModel, is_peft_model)

theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
ours = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
for model in (theirs, ours):
    assert transformers.trainer_utils._is_peft_model(model)
    assert is_peft_model(model)
    assert isinstance(model, transformers.trainer.PeftModel)
assert not transformers.trainer_utils._is_peft_model(llama())
assert not is_peft_model(llama())
assert not isinstance(ours, peft.PeftModel) and not isinstance(theirs, PeftModel)
assert issubclass(transformers.trainer.PeftModel, peft.PeftModel)
assert issubclass(peft.PeftModelForCausalLM, transformers.trainer.PeftModel)
assert transformers.trainer.PeftModel.from_pretrained.__func__ is peft.PeftModel.from_pretrained.__func__

trainer = Trainer(
    model=theirs,
    args=TrainingArguments(str(place), max_steps=1, save_steps=1, report_to=[], use_cpu=True),
    train_dataset=rows(8),
)
trainer.train()
assert (place / "checkpoint-1" / "adapter_model.safetensors").is_file()
assert not list((place / "checkpoint-1").glob("model*"))
""",
        HERE,
        tmp_path,
    )


def test_an_unknown_trainer_is_said() -> None:
    """A version that decides in another way: no whole models in checkpoints without a word."""
    done = run_python(
        """
import sys, types, warnings
trainer = types.ModuleType("transformers.trainer")
trainer._is_peft_model = lambda model: False
trainer.is_peft_available = lambda: False
from veneer.integrations.transformers import widen
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    widen(trainer)
print(*[w.message for w in caught if w.category.__name__ == "VeneerWarning"])
"""
    )
    assert "whole models into its checkpoints" in done.stdout


def test_watching_imports_nothing() -> None:
    run_python(
        """
import sys
import veneer
loaded = {"transformers", "accelerate", "trl", "veneer.integrations.transformers"} & set(sys.modules)
assert not loaded, loaded
import json.tool  # an import of another module passes through
assert json.tool.__spec__.loader.__class__.__module__ == "_frozen_importlib_external"
"""
    )
