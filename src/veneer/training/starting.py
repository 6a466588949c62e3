"""How an adapter starts: as a saved one, or anew, with EVA, CorDA and LoRA-GA measured on the examples."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from .data import IGNORED
from .forward import batches
from .launcher import own_gpu
from .losses import Objective, Preferred
from .options import MEASURED, RunOptions
from .progress import Progress
from .saved_adapter import read_adapter

#: Number of examples to measure on; about a hundred are enough.
SAMPLES = 128


def adapted(
    base: Any,
    options: RunOptions,
    rows: Sequence[Mapping[str, Any]],
    objective: Objective | Preferred,
    progress: Progress,
) -> Any:
    """The saved adapter of the options, or a new one, initialised on some of the rows if they ask for that.

    Args:
        base: The base model.
        options: The adapter's configuration, batch size and seed.
        rows: The rows of the run.
        objective: Gives the loss of a batch.
        progress: Where to report.

    Raises:
        ConfigError, TargetError: As `get_peft_model` and the measuring functions do.
        BaseMismatchError: The saved adapter belongs to another base.
    """
    if options.resume_from_adapter is not None:
        saved = read_adapter(options.resume_from_adapter)
        model = PeftModel.from_pretrained(base, saved.directory, is_trainable=True)
        model.peft_config["default"].base_model_name_or_path = options.model  # where it is now
        progress.say(f"Continuing to train the adapter {saved.name}")
        return model
    config, init = options.lora_config(), options.init_lora_weights.lower()
    if init not in MEASURED or isinstance(objective, Preferred):
        return get_peft_model(base, config)
    chosen = random.Random(options.seed).sample(range(len(rows)), min(SAMPLES, len(rows)))
    progress.say(f"Initialising the adapter ({init}) on {len(chosen)} examples")
    if next(base.parameters()).device.type == "cpu" and torch.cuda.is_available():
        base.to(torch.device("cuda", own_gpu()))  # where it will be trained
    measured = list(batches(base, [rows[i] for i in chosen], objective.collator, options.batch_size))
    if init == "corda":
        preprocess_corda(base, config, lambda: _forward(base, measured, objective))
    elif init == "lora_ga":
        preprocess_loraga(base, config, lambda: _backward(base, measured, objective))
    model = get_peft_model(base, config)
    if init == "eva":
        initialize_lora_eva_weights(
            model,
            measured,
            forward_fn=objective.loss,
            prepare_model_inputs_fn=_positions,
            show_progress_bar=False,
        )
    return model


def _forward(base: Any, batches: Sequence[Mapping[str, Tensor]], objective: Objective) -> None:
    for batch in batches:
        objective.loss(base, batch)


def _backward(base: Any, batches: Sequence[Mapping[str, Tensor]], objective: Objective) -> None:
    for batch in batches:
        loss = objective.loss(base, batch)[0] / (batch["labels"] != IGNORED).sum().clamp(min=1)
        loss.backward()  # type: ignore[no-untyped-call]


def _positions(batch: Mapping[str, Tensor], config: LoraConfig) -> Tensor:
    """The positions (n, 2) of tokens of answers or, for a classifier, of all tokens but padding."""
    labels = batch["labels"]
    counts = labels != IGNORED if labels.dim() == 2 else batch["attention_mask"].bool()
    return counts.nonzero()
