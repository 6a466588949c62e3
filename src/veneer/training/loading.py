"""How a base model is loaded that an adapter is asked or merged on: type, storage, devices."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Hint, Text, TrainingError, VeneerError
from ..wording import first_line, size
from .bounds import bounded, wrong_values
from .launcher import own_gpu
from .options import DTYPES, QUANTIZATIONS

if TYPE_CHECKING:
    import torch

#: Of a device's free memory, the share that weights may take; the rest is for activations and the cache.
ROOM = 0.85
_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu|npu|hpu)(:\d+)?")


@dataclass(frozen=True)
class Loading:
    """How to load a base model.

    Attributes:
        dtype: ``auto`` (as it was saved), ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, …; ``auto`` takes the accelerator that is there, and
            spreads a model that it cannot hold over all accelerators and the CPU's memory.
        quantize: Keep the weights as ``nf4``, ``fp4``, ``int8`` or ``int4``; ``none`` as they were saved;
            ``auto`` as the adapter was trained.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, … as in transformers; None leaves
            the choice to it.

    Raises:
        ConfigError: Values that cannot be right, all of them at once.
    """

    dtype: str = bounded("auto", choices=DTYPES)
    device: str = "auto"
    quantize: str = bounded("none", choices=("auto", "none", *QUANTIZATIONS))
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        wrong = wrong_values(self)
        if not _DEVICE.fullmatch(self.device):
            wrong.append(Text(Hint("device"), f" is auto, cpu, cuda, cuda:1, mps, …, not {self.device!r}"))
        if wrong:
            raise ConfigError(Text.join("; ", wrong))


def accelerators() -> list[torch.device]:
    """The accelerators that torch sees, or an empty list."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return []
    if found.type == "mps":
        return [found]
    return [torch.device(found.type, number) for number in range(torch.accelerator.device_count())]


def check_device(name: str) -> None:
    """Refuse a device that is not there, and name those that are."""
    there = [str(device) for device in accelerators()]
    if name not in ("auto", "cpu", *there, *(device.partition(":")[0] for device in there)):
        raise TrainingError(
            Hint("device", name), f": this machine has no such device, only {', '.join(['cpu', *there])}"
        )


def training_device() -> torch.device | None:
    """The accelerator that this process trains on, None for the CPU."""
    there = accelerators()
    return there[own_gpu() % len(there)] if there else None


def device_map(source: str | os.PathLike[str], loading: Loading) -> tuple[Any, str | None]:
    """Where ``from_pretrained`` is to put a base model, and a sentence about it where it is not the CPU.

    Args:
        source: A directory, or a repository id of the hub; only its configuration is read.
        loading: What was asked for.

    Returns:
        What transformers calls ``device_map``, or None for the CPU; and the sentence, or None.

    Raises:
        TrainingError: The device is not there.
    """
    check_device(loading.device)
    there = accelerators()
    if loading.device == "cpu" and loading.quantize != "none":
        return {"": "cpu"}, None  # without a map, codes go to a GPU
    if loading.device == "cpu" or (loading.device == "auto" and not there):
        return None, None
    if loading.device != "auto":
        return {"": loading.device}, None
    first, free = there[0], free_bytes(there[0])
    if free is None:
        return {"": str(first)}, f"The base model goes to {first}."
    try:
        needed = weight_bytes(source, loading)
    except VeneerError as error:  # whoever loads the model says what is wrong with it
        return {"": str(first)}, f"The base model goes to {first}; its size is unknown: {first_line(error)}"
    if needed <= ROOM * free:
        return {"": str(first)}, f"The base model goes to {first}."
    return "auto", (
        f"The base model takes {size(needed)} and {first} has {size(free)} free: it is spread "
        "over all devices and the CPU's memory, which is slower. Quantising makes it smaller."
    )


def weight_bytes(source: str | os.PathLike[str], loading: Loading) -> int:
    """Bytes that the weights and buffers of a base model take, told from its configuration alone."""
    from .planning.memory import base_bytes
    from .planning.sources import empty_model

    model = empty_model(source, dtype=None if loading.dtype == "auto" else loading.dtype)
    return base_bytes(model, None if loading.quantize in ("none", "auto") else loading.quantize)[0]


def free_bytes(device: torch.device) -> int | None:
    """Free memory of an accelerator, None where torch cannot tell."""
    import torch

    module = getattr(torch, device.type, None)
    try:
        free, _ = module.mem_get_info(device)  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None
    return int(free)
