"""Learning from preferences: TRL's DPOTrainer loops, under the same options, checkpoints and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..integrations.transformers import enable_trainer
from .models import require
from .trainer import Setup, arguments, keeping, one_device, ready


def preference_trainer(setup: Setup, beta: float, max_length: int, callbacks: Sequence[Any]) -> Any:
    """TRL's DPOTrainer on rows of ``prompt``, ``chosen`` and ``rejected``.

    What is strayed from is the model as it is now: TRL keeps a frozen copy of the adapter beside it, and
    none of the base.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", equation 7.

    Raises:
        MissingExtraError: TRL is not installed.
    """
    for library in ("trl", "datasets"):
        require(library, "train", "learning from preferences")
    from datasets import (
        Dataset,
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from trl import DPOConfig, DPOTrainer

    enable_trainer()

    class PreferenceTrainer(keeping(DPOTrainer)):  # type: ignore[misc]
        """TRL's, with checkpoints that are whole."""

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        trainer = PreferenceTrainer(
            model=setup.model,
            args=one_device(DPOConfig(**arguments(setup), beta=beta, max_length=max_length)),
            train_dataset=Dataset.from_list(list(setup.rows)),
            eval_dataset=Dataset.from_list(list(setup.eval_rows)) if setup.eval_rows else None,
            processing_class=setup.tokenizer,
        )
    finally:
        if shown:
            enable_progress_bars()
    return ready(trainer, setup, callbacks)
