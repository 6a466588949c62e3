"""Data, options and checks for TRL's trainers in fresh processes; imported there by path, after `tiny`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tiny import X, llama, shake
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import VeneerWarning
from veneer.testing.tolerances import assert_close

transformers.logging.disable_progress_bar()
warnings.simplefilter("error", VeneerWarning)
SMALL = {f"w{i}" for i in range(24)}
COMMON: dict[str, Any] = {
    "max_steps": 2,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "disable_tqdm": True,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(48)} | {"<eos>": 48, "<pad>": 49}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def counting(start: int, step: int = 1, length: int = 6) -> str:
    return " ".join(f"w{(start + step * j) % 48}" for j in range(length))


def texts() -> Dataset:
    return Dataset.from_list([{"text": counting(i)} for i in range(8)])


def preferences() -> Dataset:
    """Counting up is chosen, counting down is rejected."""
    rows = [
        {"prompt": counting(i), "chosen": " " + counting(i + 6), "rejected": " " + counting(i + 6, -1)}
        for i in range(8)
    ]
    return Dataset.from_list(rows)


def judged() -> Dataset:
    rows = [
        {"prompt": counting(i), "completion": " " + counting(i + 6), "label": i % 2 == 0} for i in range(8)
    ]
    return Dataset.from_list(rows)


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": counting(i)} for i in range(8)])


def config(**options: Any) -> LoraConfig:
    given = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"], **options}
    return LoraConfig(**{"task_type": "CAUSAL_LM", **given})


def reward_model() -> Any:
    """A classifier with one output over the tiny llama."""
    torch.manual_seed(0)
    made = llama().config
    made.num_labels, made.pad_token_id = 1, 49
    return transformers.LlamaForSequenceClassification(made).eval()


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """The values of all that must not move: what is not trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def history(trainer: Any, what: str = "loss") -> list[float]:
    """What was logged at each step."""
    return [entry[what] for entry in trainer.state.log_history if what in entry]


def check_trained(trainer: Any, base: Callable[[], Any]) -> Any:
    """Train; then: only the adapter moved, its checkpoint holds it alone, loads equal, and merges equal."""
    from safetensors.torch import load_file

    model = trainer.model
    assert type(model).__module__ == "veneer.peft_model", type(model)
    before, start = frozen(model), copy.deepcopy(dict(model.named_parameters()))
    assert all("lora_" not in name or ".ref." in name for name in before), sorted(before)
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == (name in before), name

    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.args.max_steps}"
    assert not list(folder.glob("model*")) + list(folder.glob("pytorch_model*"))
    held = load_file(folder / "adapter_model.safetensors")
    heads = [key for key in held if ".lora_" not in key]
    assert len(held) == 8 + len(heads) and all("score" in key for key in heads), sorted(held)

    wanted = outputs(model)
    again = PeftModel.from_pretrained(base(), folder)
    assert torch.equal(outputs(again), wanted)
    assert not torch.equal(outputs(base()), wanted)
    assert_close(outputs(again.merge_and_unload()), wanted)
    model.merge_adapter()
    assert_close(outputs(model), wanted)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), wanted)
    print("trained:", type(trainer).__name__, history(trainer))
    return trainer


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(X).logits
    return logits


def _make(
    kind: str, place: Path, model: Any, data: Dataset | None, options: dict[str, Any] | None, **more: Any
) -> Any:
    import trl

    arguments = getattr(trl, f"{kind}Config")(str(place), **{**COMMON, **(options or {})})
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer(), **more
    )


def sft(place: Path, model: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    return _make("SFT", place, model, texts(), {"max_length": 16, **(options or {})}, **more)


def dpo(place: Path, model: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    return _make("DPO", place, model, preferences(), {"max_length": 16, **(options or {})}, **more)


def kto(place: Path, model: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    given = {"max_length": 16, "per_device_train_batch_size": 4, **(options or {})}
    return _make("KTO", place, model, judged(), given, **more)


def reward(place: Path, model: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    return _make("Reward", place, model, preferences(), {"max_length": 16, **(options or {})}, **more)


def share_of_small_words(completions: list[str], **_: Any) -> list[float]:
    return [sum(word in SMALL for word in text.split()) / 6 for text in completions]


def online(kind: str, place: Path, model: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    """GRPO or RLOO: it writes completions itself and is rewarded for them."""
    given = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "beta": 0.1,
        **(options or {}),
    }
    return _make(kind, place, model, prompts(), given, reward_funcs=share_of_small_words, **more)


def ready(base: Any, **options: Any) -> Any:
    """A model whose adapter has been trained before."""
    model = get_peft_model(base, config(**options))
    shake(model)
    return model
