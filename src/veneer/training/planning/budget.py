"""Settings that keep training within a budget: a fixed ladder, tried from the top."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from torch import nn

from ...config import LoraConfig
from ...errors import Hint, Text, TrainingError
from ...inject.sites import model_type
from ...targets import DEFAULT_TARGETS
from ...wording import size
from .limits import Budget, parse_budget
from .memory import MemoryEstimate, Step, adapt_shadow, base_bytes, estimate_memory

#: Part of a memory budget that stays free, for what no estimate sees: kernels' scratch, fragments.
SPARE = 0.05
RANKS = (16, 8, 4, 2, 1)
LARGEST_RANK = 512
LOSS_CHUNK = 256


@dataclass(frozen=True)
class Proposal:
    """Settings within a budget.

    Attributes:
        config: The adapter.
        step: Batch size, quantisation and so on.
        estimate: Memory and arithmetic of these settings.
        given_up: What was changed for the budget, in words.
    """

    config: LoraConfig
    step: Step
    estimate: MemoryEstimate
    given_up: tuple[str, ...] = ()


def propose(
    model: nn.Module,
    config: LoraConfig,
    budget: Budget | str,
    step: Step | None = None,
    fixed: Collection[str] = (),
) -> Proposal:
    """Find settings that keep training within a budget.

    For memory, in this order: gradient checkpointing, logits in chunks, smaller batches (more of them for
    each optimizer step), all of this with the base in 4 bits, lower ranks, and only the model's default
    targets. The first settings that leave 5 % free are taken. For parameters: the highest rank within the
    budget, on the configured targets or else on the default ones.

    Args:
        model: As for `estimate_memory`.
        config: The adapter to start from.
        budget: A budget or its text.
        step: The step to start from.
        fixed: Names of settings to keep: ``r``, ``target_modules``, ``quantize``, ``batch_size``,
            ``gradient_checkpointing``, ``loss_chunk_size``.

    Raises:
        TrainingError: No settings are within the budget; names the smallest.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    step = Step() if step is None else step
    if budget.share is not None:
        return _within_share(model, config, budget, step, fixed)
    room = int((budget.memory or 0) * (1 - SPARE))
    tried = []
    for adapter, taken in _ladder(model, config, step, fixed):
        if base_bytes(model, taken.quantize)[0] > room:
            continue
        estimate = estimate_memory(model, adapter, taken)
        tried.append((estimate, adapter, taken))
        if estimate.peak <= room:
            return Proposal(adapter, taken, estimate, tuple(_given_up(config, step, adapter, taken)))
    kept = Text(" Kept as given: ", Text.join(", ", map(Hint, sorted(fixed))), ".") if fixed else ""
    if not tried:
        quantize = step.quantize if "quantize" in fixed else step.quantize or "nf4"
        raise TrainingError(
            f"nothing fits into {budget.text}: the base alone takes {size(base_bytes(model, quantize)[0])}",
            "." if "quantize" in fixed else " even in 4 bits.",
            kept,
            " Use a smaller model, or more memory",
        )
    least, adapter, taken = min(tried, key=lambda found: found[0].peak)
    raise TrainingError(
        f"nothing fits into {budget.text}, of which 5 % stay free: the smallest settings found take "
        f"{size(least.peak)}, of which {size(least.base)} are the base, with rank {adapter.r}, ",
        Hint("batch_size", taken.batch_size),
        f", {taken.quantize or 'no'} quantisation.",
        kept,
        f" Shorter examples ({step.sequence_length} tokens now), a smaller model or more memory would help",
    )


def _ladder(
    model: nn.Module, config: LoraConfig, step: Step, fixed: Collection[str]
) -> Iterator[tuple[LoraConfig, Step]]:
    rungs = [step]
    if "gradient_checkpointing" not in fixed and not step.gradient_checkpointing:
        rungs.append(replace(rungs[-1], gradient_checkpointing=True))
    if "loss_chunk_size" not in fixed and not step.loss_chunk_size and config.task_type == "CAUSAL_LM":
        rungs.append(replace(rungs[-1], loss_chunk_size=LOSS_CHUNK))
    rows = step.batch_size
    examples = rows * step.gradient_accumulation_steps
    while "batch_size" not in fixed and rows > 1:
        rows //= 2
        rungs.append(replace(rungs[-1], batch_size=rows, gradient_accumulation_steps=examples // rows))
    if "quantize" not in fixed and step.quantize is None:
        rungs += [replace(rung, quantize="nf4") for rung in rungs]
    yield from ((config, rung) for rung in rungs)
    for adapter in _targets(model, config, fixed):
        ranks = [adapter.r, *(() if "r" in fixed else (r for r in RANKS if r < adapter.r))]
        yield from ((_of_rank(adapter, r), rungs[-1]) for r in ranks if (adapter, r) != (config, config.r))


def _given_up(config: LoraConfig, step: Step, adapter: LoraConfig, taken: Step) -> Iterator[str]:
    """How the settings differ from the given ones."""
    if taken.gradient_checkpointing != step.gradient_checkpointing:
        yield "activations are computed again in the backward pass"
    if taken.loss_chunk_size != step.loss_chunk_size:
        yield "logits are computed in chunks"
    if taken.batch_size < step.batch_size:
        yield f"batches of {taken.batch_size} instead of {step.batch_size}, and more of them a step"
    if taken.quantize != step.quantize:
        yield f"the base is kept in 4 bits ({taken.quantize})"
    if adapter.r != config.r:
        yield f"rank {adapter.r} instead of {config.r}"
    if adapter.target_modules != config.target_modules:
        yield "fewer targets"


def _targets(model: nn.Module, config: LoraConfig, fixed: Collection[str]) -> Iterator[LoraConfig]:
    """The adapter as it is, then on the model's default targets."""
    yield config
    usual = DEFAULT_TARGETS.get(model_type(model) or "")
    if "target_modules" not in fixed and usual is not None and config.target_modules != usual:
        yield replace(config, target_modules=usual if isinstance(usual, str) else list(usual))


def _of_rank(config: LoraConfig, r: int) -> LoraConfig:
    if r == config.r:
        return config
    alpha = config.lora_alpha * (r / config.r) ** (0.5 if config.use_rslora else 1.0)
    return replace(config, r=r, lora_alpha=int(alpha) if alpha == int(alpha) else alpha)


def _within_share(
    model: nn.Module, config: LoraConfig, budget: Budget, step: Step, fixed: Collection[str]
) -> Proposal:
    total = sum(p.numel() for p in model.parameters())
    room = int((budget.share or 0.0) * total)
    smallest = []
    for adapter in _targets(model, config, fixed):
        one, two = (_trainable(model, _of_rank(adapter, r)) for r in (1, 2))
        each, rest = max(1, two - one), one - (two - one)
        smallest.append(_trainable(model, adapter) if "r" in fixed else one)
        r = adapter.r if "r" in fixed else min(LARGEST_RANK, (room - rest) // each)
        if r >= 16:
            r -= r % 8  # kernels like multiples of 8
        if r < 1 or smallest[-1] > room:
            continue
        chosen = _of_rank(adapter, r)
        given_up = tuple(_given_up(config, step, chosen, step))
        return Proposal(chosen, step, estimate_memory(model, chosen, step), given_up)
    raise TrainingError(
        f"nothing keeps to {budget.text} of {total:,} parameters, that is {room:,}: the smallest adapter "
        f"found has {min(smallest):,} ({min(smallest) / max(1, total):.3%}). Name fewer ",
        Hint("target_modules"),
    )


def _trainable(model: nn.Module, config: LoraConfig) -> int:
    return sum(p.numel() for p in adapt_shadow(model, config).parameters() if p.requires_grad)
