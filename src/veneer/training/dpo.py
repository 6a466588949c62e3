"""Direct preference optimisation, by TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from .libraries import quiet_libraries
from .losses import Pairs
from .resuming import Run
from .trainer import arguments, one_device


def preference_trainer(
    model: Any, tokenizer: Any, rows: Sequence[Any], eval_rows: Sequence[Any], run: Run, pairs: Pairs
) -> Any:
    """TRL's DPOTrainer on rows of ``prompt``, ``chosen`` and ``rejected``.

    The reference is the model as it is now: TRL keeps a frozen copy of the adapter, not of the base.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", equation 7.
    """
    values = {name: value for name, value in arguments(run).items() if name != "label_names"}
    with quiet_libraries():
        return DPOTrainer(
            model=model,
            args=one_device(DPOConfig(**values, beta=pairs.beta, max_length=pairs.max_length)),
            train_dataset=Dataset.from_list(list(rows)),
            eval_dataset=Dataset.from_list(list(eval_rows)) if eval_rows else None,
            processing_class=tokenizer,
        )
