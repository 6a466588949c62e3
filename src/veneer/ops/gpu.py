"""Whether the fused linear step runs in Triton; nothing else imports the kernels.

Triton is optional, large, and useful on CUDA devices only, so `import veneer` and work on a CPU never import
it. Each device is tested once: before the kernels are used they compute a small step, values and gradients,
which must agree with plain torch. If it does not, or cannot be compiled, there is a warning and plain torch
is used.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from veneer.wording import warn

#: The environment variable that turns Triton on; off by default until the kernels have run on a GPU.
SWITCH = "VENEER_TRITON"
#: The largest rank that the kernels are tested with.
LARGEST_RANK = 256
#: Elements of a block of the output, of which each multiprocessor should get one: an estimate, not measured.
BLOCK = 128 * 128


def triton_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, B_bias: Tensor | None
) -> type[torch.autograd.Function] | None:
    """The autograd function that computes `lora_linear` for these CUDA tensors in Triton, or None.

    None where torch's own products are faster or the only ones: for types other than float16 and bfloat16,
    sizes too small to fill the device, shapes that do not match (torch then raises), without Triton, on
    devices of other makers than NVIDIA or older than Ampere, and unless ``VENEER_TRITON=1``.

    Args:
        x, weight, bias, A, B, B_bias: as for `lora_linear`; the factors may have another dtype than x.
    """
    if os.environ.get(SWITCH) != "1" or not _suits(x, weight, bias, A, B, B_bias):
        return None
    inside, out = weight.shape[1], weight.shape[0]
    if not _fills(x.numel() // inside, inside, out, _multiprocessors(x.device)):
        return None
    return _checked_step(x.device, x.dtype)


def _suits(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, B_bias: Tensor | None
) -> bool:
    tensors = [tensor for tensor in (x, weight, bias, A, B, B_bias) if tensor is not None]
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype)
        and all(tensor.device == x.device for tensor in tensors)
        and weight.dim() == A.dim() == B.dim() == 2
        and x.dim() > 0
        and x.numel() > 0
        and A.shape[0] <= LARGEST_RANK
        and x.shape[-1] == weight.shape[1] == A.shape[1]
        and B.shape == (weight.shape[0], A.shape[0])
        and all(b is None or b.shape == weight.shape[:1] for b in (bias, B_bias))
    )


def _fills(rows: int, inside: int, out: int, multiprocessors: int) -> bool:
    """Whether both large products, (rows, out) and (rows, in), have a block for each multiprocessor."""
    return rows * min(inside, out) >= multiprocessors * BLOCK


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _checked_step(device: torch.device, dtype: torch.dtype) -> type[torch.autograd.Function] | None:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if find_spec("triton") is None:
        return None
    try:
        from veneer.ops import triton_lora

        reason = triton_lora.disagreement(device, dtype)
    # No C compiler, a driver or a Triton that is too old, a block too large for the device.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return triton_lora.TritonLora
    warn(
        f"LoRA on {device} computes {dtype} in plain torch, not in Triton: {reason}. The results are right, "
        f"the steps slower. Without {SWITCH}=1 in the environment, plain torch is used and nothing is said"
    )
    return None
