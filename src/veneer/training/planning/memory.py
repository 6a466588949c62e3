"""Estimate the memory and arithmetic of a training step without running it."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import base_of
from ...config import LoraConfig
from ...errors import ConfigError, Text, VeneerError, VeneerWarning
from ...files.keys import PREFIX
from ...inject.base_tensors import embedding_of
from ...peft_model import get_peft_model
from ...wording import first_line, listed
from ..bounds import bounded, wrong_values
from ..libraries import quiet_libraries
from ..options import RunOptions
from .sources import shadow
from .tracing import Trace, trace_step

_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)
#: Bytes a weight in a quantised linear layer: bitsandbytes' 4 bits with a scale for 64 weights, itself in 8
#: bits with one for 256, its 8 bits with a scale a row, torchao's 4 bits with scale and zero for 128 weights.
QUANTIZED = {"nf4": _DOUBLE, "fp4": _DOUBLE, "int8": 1.0, "int4": 0.5 + 4 / 128}
#: Part of an optimizer's name -> how many numbers it keeps for each parameter; the first that fits counts.
_STATES = {"adafactor": 0, "lion": 1, "ademamix": 3, "adam": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1}
#: bitsandbytes keeps the state of smaller tensors in 32 bits.
_SMALLEST_8BIT = 4096
#: Share of a plain matrix product's rate that a training step reaches: an estimate, see
#: `seconds_per_step`.
REACHED = 0.6


@dataclass(frozen=True)
class MemoryEstimate:
    """What training needs, in bytes.

    Attributes:
        base: Frozen weights and buffers, quantised if the step says so.
        factors: Trainable parameters: factors and modules of ``modules_to_save``.
        gradients: Gradients of the trainable parameters.
        optimizer: State of the optimizer.
        activations: Kept for the backward pass just before the output head.
        logits: The most on top of that until the loss.
        peak: The most at any moment of a step after the first. Mostly less than the sum of the above, as
            gradients are made while activations are freed.
        trainable: Number of trainable parameters.
        parameters: Number of all parameters.
        adapter_bytes: Size of the saved adapter.
        flops: FLOPs of one forward and backward pass.
        forward_flops: FLOPs of the forward pass.
        tokens: Tokens in the batch.
        traced: Whether the step was traced on the meta device; otherwise activations are a rough sum.
        unreached: Paths of adapted modules that no gradient reached in the traced step.
        notes: Assumptions, what the figures leave out, and what is wrong.
    """

    base: int
    factors: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    trainable: int
    parameters: int
    adapter_bytes: int
    flops: int
    forward_flops: int
    tokens: int
    traced: bool = True
    unreached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def flops_per_token(self) -> int:
        """FLOPs of both passes for each token."""
        return self.flops // max(1, self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "flops_per_token": self.flops_per_token}


@dataclass(frozen=True)
class Step:
    """The settings of a training step that its memory depends on.

    Attributes:
        batch_size: Rows in a forward pass.
        sequence_length: Tokens in a row of the longest batch.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        gradient_accumulation_steps: If above 1, gradients exist during the whole step.
        optim: transformers' name of the optimizer.
        quantize: Storage of the base's weights: ``nf4``, ``fp4``, ``int8``, ``int4`` or None.
        loss_chunk_size: Tokens whose logits are computed at a time; 0 is all.
        padded: Whether rows have padding, for which each layer keeps a mask of length × length; None means
            yes if there is more than one row.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: Numbers that cannot be, or an unknown quantisation.
    """

    batch_size: int = bounded(8, above=0)
    sequence_length: int = bounded(1024, above=0)
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = bounded(1, above=0)
    optim: str = "adamw_torch"
    quantize: str | None = bounded(None, choices=tuple(QUANTIZED))
    loss_chunk_size: int = bounded(0, least=0)
    padded: bool | None = None
    device: str = "cpu"

    @classmethod
    def of(cls, options: RunOptions, **more: Any) -> Step:
        """The step of a run with these options; ``more`` overrides them."""
        names = {part.name for part in dataclasses.fields(cls)}
        shared = {part.name for part in dataclasses.fields(options)} & names
        given = {name: getattr(options, name) for name in shared} | {"sequence_length": options.max_length}
        return cls(**{**given, "padded": False if options.packing else None, **more})

    def __post_init__(self) -> None:
        if wrong := wrong_values(self):
            raise ConfigError(Text.join("; ", wrong))


def estimate_memory(model: nn.Module, config: LoraConfig, step: Step | None = None) -> MemoryEstimate:
    """Estimate a training step by running it on the meta device, where tensors take no memory.

    Args:
        model: A model without adapters, from `empty_model` or a real one that is not quantised; not changed.
        config: The adapter.
        step: Settings of the step; ``Step()`` if None.

    Returns:
        The estimate. On a CPU it is the memory of torch's allocator; Python, libraries and buffers of their
        kernels take about 0.5 GB more.

    Raises:
        TargetError: The adapter does not fit the model.
    """
    step = Step() if step is None else step
    adapted = adapt_shadow(model, config)
    notes = enable_checkpointing(adapted) if step.gradient_checkpointing else []
    trained = [p for p in adapted.parameters() if p.requires_grad]
    factors = _bytes(trained)
    base, unpacked = base_bytes(adapted, step.quantize, frozen_only=True)
    accumulated = factors if step.gradient_accumulation_steps > 1 else 0
    if accumulated:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    silent = dict.fromkeys(name for name, p in adapted.named_parameters() if p.requires_grad)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(_heard, silent, name))  # type: ignore[no-untyped-call]
    trace, reason = _trace(adapted, step)
    state, said = optimizer_bytes(step.optim, trained)
    notes += [reason] if reason else []
    paths = dict.fromkeys(name.partition(".lora_")[0].removeprefix(PREFIX) for name in silent)
    unreached = () if reason else tuple(paths)
    notes += [no_gradient(unreached)] if unreached else []
    if step.quantize:
        notes.append(
            f"quantised weights are counted as {QUANTIZED[step.quantize]:.3g} bytes each, and one layer at a "
            "time is unpacked"
        )
    # The optimizer works with all gradients there; a CPU needs one tensor of scratch, CUDA one for all.
    scratch = factors if step.device == "cuda" else max((_bytes([p]) for p in trained), default=0)
    return MemoryEstimate(
        base=base,
        factors=factors,
        gradients=factors,
        optimizer=state,
        activations=trace.activations,
        logits=trace.logits,
        peak=base + factors + state + max(trace.peak + unpacked + accumulated, factors + scratch),
        trainable=sum(p.numel() for p in trained),
        parameters=sum(p.numel() for p in adapted.parameters()),
        adapter_bytes=factors,
        flops=trace.flops,
        forward_flops=trace.forward_flops,
        tokens=step.batch_size * step.sequence_length,
        traced=not reason,
        unreached=unreached,
        notes=(*notes, *said),
    )


def no_gradient(paths: Sequence[str]) -> str:
    """What is said of adapted modules that no gradient reaches."""
    return (
        f"no gradient reaches the adapter of {listed(paths)}: the model reads the weight without calling the "
        "module, or has no use for it in this task"
    )


def _heard(silent: dict[str, None], name: str, gradient: Tensor) -> None:
    """A hook that is called with the gradient of a parameter."""
    silent.pop(name, None)


def adapt_shadow(model: nn.Module, config: LoraConfig) -> nn.Module:
    """A copy of the model on the meta device with the adapter on it, ready for training."""
    empty: Any = shadow(model)
    own: Any = getattr(empty, "config", None)
    if hasattr(own, "use_cache"):
        own.use_cache = False
    if own is not None and hasattr(own, "pad_token_id") and own.pad_token_id is None:
        own.pad_token_id = 0  # classifiers refuse several rows without one
    plain = dataclasses.replace(config, init_lora_weights=True)  # others would read weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # the plan has reported what matches nothing
        return get_peft_model(empty, plain, low_cpu_mem_usage=True).train()


def optimizer_bytes(optim: str, trained: Sequence[Tensor]) -> tuple[int, list[str]]:
    """(bytes of an optimizer's state, notes)."""
    name = next((part for part in _STATES if part in optim), None)
    if name is None:
        return 2 * _bytes(trained), [f"the optimizer {optim!r} is not known here: counted like AdamW"]
    if name == "adafactor":  # a number for each row and column
        return sum(4 * sum(p.shape) if p.dim() > 1 else 4 * p.numel() for p in trained), []
    bits = next((bits for bits in (8, 4) if f"{bits}bit" in optim), None)
    if bits is None:
        return _STATES[name] * _bytes(trained), []
    each = _STATES[name] * bits / 8
    sizes = (p.numel() for p in trained)
    return int(sum(n * each * (4 if n < _SMALLEST_8BIT else 1 + 4 / 256) for n in sizes)), []


def seconds_per_step(
    estimate: MemoryEstimate, *, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> float:
    """A rough time of one forward and backward pass on this machine.

    Times a square matrix product for a fifth of a second and assumes that a step reaches 60 % of its rate;
    small models reach less.
    """
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), torch.float32)
    side = 4096 if device == "cuda" else 768
    a = torch.ones(side, side, dtype=wanted, device=device)

    def multiply() -> float:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begun, ended, rounds = multiply(), 0.0, 0
    while ended - begun < 0.2:
        ended, rounds = multiply(), rounds + 1
    rate = 2.0 * side**3 * rounds / (ended - begun)
    return estimate.flops / (REACHED * rate)


def enable_checkpointing(model: Any) -> list[str]:
    """Let a model compute its activations again in the backward pass; a note where it cannot."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(model, name, None)
        if callable(enable):
            try:
                with quiet_libraries():
                    enable({"use_reentrant": False})
            except ValueError:
                break
            return []
    return ["this model has no gradient checkpointing: counted without"]


def _trace(model: nn.Module, step: Step) -> tuple[Trace, str]:
    """(trace, "") or, if the model cannot be traced, (rough sum, reason)."""
    padded = step.batch_size > 1 if step.padded is None else step.padded
    try:
        inputs = dummy_inputs(model, step.batch_size, step.sequence_length)
        with quiet_libraries():
            return trace_step(
                model, inputs, device=step.device, loss_chunk_size=step.loss_chunk_size, padded=padded
            ), ""
    except VeneerError:
        raise
    except Exception as error:
        reason = first_line(error)[:100]
        return _rough(model, step.batch_size * step.sequence_length), (
            f"activations are only the inputs and outputs of the linear layers, added up: this model cannot "
            f"be run without values ({reason})"
        )


def dummy_inputs(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    """A batch for the model, on the meta device.

    Raises:
        ValueError: The model takes neither token ids nor pictures.
    """
    base = base_of(model)
    config: Any = getattr(base, "config", None)
    name = getattr(base, "main_input_name", "input_ids")
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {name: torch.empty(batch, getattr(config, "num_channels", 3), *sides, device="meta")}
    if name != "input_ids":
        raise ValueError(f"its input is {name}")
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _rough(model: nn.Module, tokens: int) -> Trace:
    """The inputs and outputs of all linear layers, and 2 FLOPs for each weight and token in each pass."""
    kept = weights = 0
    head = 0
    out = embedding_of(model, "output")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            size = module.weight.element_size()
            if module is out:
                head = tokens * module.out_features * (size + 12)
            else:
                kept += tokens * (module.in_features + module.out_features) * size
            weights += module.weight.numel()
    flops = 2 * tokens * weights
    return Trace(kept, head, kept + head, 0, flops, 2 * flops)


def base_bytes(model: Any, quantize: str | None, *, frozen_only: bool = False) -> tuple[int, int]:
    """(bytes of the base, bytes of its largest quantised weight when unpacked).

    Args:
        model: With or without an adapter.
        quantize: As for `Step`.
        frozen_only: Leave out what requires gradients.
    """
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not (frozen_only and t.requires_grad)]
    if quantize is None:
        return _bytes(frozen), 0
    head = embedding_of(model, "output")
    packed: dict[int, Tensor] = {}
    for module in model.modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not head and not (frozen_only and module.weight.requires_grad):
            packed[id(module.weight)] = module.weight
    share = QUANTIZED[quantize]
    rest = _bytes(t for t in frozen if id(t) not in packed)
    weights = sum(math.ceil(w.numel() * share) for w in packed.values())
    return rest + weights, max((w.numel() * w.element_size() for w in packed.values()), default=0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
