"""Learning from preferences, by TRL's trainers."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..errors import MissingExtraError, TrainingError
from ..wording import first_line
from .libraries import quiet_libraries
from .losses import Preferred
from .resuming import Run
from .trainer import arguments, one_device

#: Method -> the beginning of the names of TRL's trainer and configuration.
TRAINERS = {"dpo": "DPO", "kto": "KTO", "orpo": "ORPO", "reward": "Reward"}


def preference_trainer(
    model: Any, tokenizer: Any, rows: Sequence[Any], eval_rows: Sequence[Any], run: Run, learned: Preferred
) -> Any:
    """TRL's trainer for a method, on rows from `encode_preferences`.

    DPO and KTO compare with the model as it is now: TRL keeps a frozen copy of the adapter, not of the base.

    Sources: Rafailov et al. 2023, "Direct Preference Optimization", equation 7; Ethayarajh et al. 2024,
    "KTO"; Hong et al. 2024, "ORPO", equation 6. A reward model learns by the loss of Bradley and Terry.

    Raises:
        TrainingError: TRL refuses the model or the options.
        MissingExtraError: The installed TRL does not have the trainer.
    """
    trainer, config = _of_trl(learned.method)
    known = {part.name for part in dataclasses.fields(config)}
    own = {"beta": learned.beta, "max_length": learned.max_length}
    values = {name: value for name, value in arguments(run).items() if name != "label_names"}
    values |= {name: value for name, value in own.items() if name in known}
    with quiet_libraries():
        data, held_out = (Dataset.from_list(list(part)) if part else None for part in (rows, eval_rows))
        if learned.method == "kto" and data is not None:  # its rows are taken in their order
            data = data.shuffle(seed=run.options.seed)
        try:
            return trainer(
                model=model,
                args=one_device(config(**values)),
                train_dataset=data,
                eval_dataset=held_out,
                processing_class=tokenizer,
            )
        except ValueError as error:
            raise TrainingError(f"TRL's {trainer.__name__} refuses: {first_line(error)}") from error


def _of_trl(method: str) -> tuple[Any, Any]:
    """The classes of a trainer and of its configuration; TRL moves those that are experimental."""
    name = TRAINERS[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the place of an experimental trainer may change
        for place in ("trl", f"trl.experimental.{method}"):
            try:
                module = importlib.import_module(place)
                return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
            except (ModuleNotFoundError, AttributeError):
                continue
    raise MissingExtraError(f"trl with {name}Trainer", "train", f"the method {method}")
