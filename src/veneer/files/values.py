"""Which values the tensors of an adapter may have."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from veneer.errors import AdapterFileError, Hint
from veneer.ops.merging import is_finite
from veneer.wording import listed, warn

_OF_THE_ADAPTER = re.compile(r"(^|\.)(lora_\w+|trainable_tokens_delta)(\.|$)")
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_values(
    tensors: Mapping[str, torch.Tensor], where: object, *, check_finite: bool | None = None
) -> None:
    """Refuse NaN, infinity, and factors that are not of a floating-point type.

    Args:
        tensors: By their names on disk or in memory.
        where: What to call them in messages.
        check_finite: False warns of NaN and infinity instead; None refuses them and offers no option.

    Raises:
        AdapterFileError: Naming them.
    """
    wrong = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors.items()
        if tensor.dtype not in _TYPES and _OF_THE_ADAPTER.search(name)
    ]
    if wrong:
        raise AdapterFileError(
            f"{where}: {len(wrong)} of {len(tensors)} tensors are no factors, which are floating-point "
            f"numbers of 16 bits or more: {listed(wrong)}. The file is damaged, or was quantised"
        )
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if not broken:
        return
    message = f"{where}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity: {listed(broken)}"
    if check_finite is not False:
        way_out = () if check_finite is None else (Hint("check_finite", False, "; {} loads it all the same"),)
        raise AdapterFileError(f"{message}. Training diverged, or the file is damaged", *way_out)
    warn(message)
