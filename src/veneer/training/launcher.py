"""What a launcher (torchrun, accelerate launch) tells each process of a run in its environment."""

from __future__ import annotations

import os

from ..errors import TrainingError

#: How to launch a run that shards the model.
_SHARDED = "accelerate launch --use_fsdp --fsdp_version 2"


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_gpu() -> int:
    """The number of this process's GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_sharded() -> bool:
    """Whether each process holds a part of the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_launcher() -> None:
    """Refuse what a launcher asks for and nobody would do.

    Raises:
        TrainingError: Naming the variable that the launcher set.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise TrainingError(
            "ACCELERATE_USE_DEEPSPEED asks for DeepSpeed, which is not supported here. To train a model in "
            f"shards: {_SHARDED}"
        )
    if not is_sharded():
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise TrainingError(
            "ACCELERATE_USE_FSDP asks for a model in shards, and of the two ways to shard FSDP2 is "
            f"supported: {_SHARDED}"
        )
    import torch

    if not torch.cuda.is_available():
        raise TrainingError(
            "ACCELERATE_USE_FSDP asks for a model in shards, and accelerate shards on GPUs only: on CPUs "
            "launch without it (torchrun, accelerate launch --multi_gpu), and each process holds the whole "
            "model"
        )
