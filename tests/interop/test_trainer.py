"""transformers' Trainer with a Veneer model: what it saves, what it resumes, through which door."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.processes import run_python

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
    options = {"save_steps": 4, "max_steps": 8, **options}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(out), per_device_train_batch_size=4, logging_steps=1, learning_rate=0.05, seed=3,
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


def test_best_model_evaluation_and_label_smoothing(nopeft_python: Path, tmp_path: Path) -> None:
    """The best checkpoint comes back; the base's own loss function and signature are found."""
    run_python(
        f"import veneer\n{TRAIN}"
        + """
place = Path(sys.argv[2])
trainer, _ = run(
    place, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
    metric_for_best_model="eval_loss", label_smoothing_factor=0.1,
)
history = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
best = min(history, key=history.get)
kept = load_file(place / f"checkpoint-{best}" / "adapter_model.safetensors")
from veneer import get_peft_model_state_dict
now = get_peft_model_state_dict(trainer.model)
assert kept.keys() == now.keys() and all(torch.equal(kept[k], now[k]) for k in kept)
assert trainer.label_names == ["labels"] and "attention_mask" in trainer._signature_columns
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
