"""From a budget to settings: what is given up first, until training fits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...config import LoraConfig
from ...errors import ConfigError, Hint, Text, TrainingError
from ...targets import DEFAULT_TARGETS
from .memory import MemoryEstimate, adapt_shadow, base_bytes, estimate_memory

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
#: Part of a memory budget that stays free, for what no estimate sees: kernels' scratch, fragments.
SPARE = 0.05
RANKS = (16, 8, 4, 2, 1)
LARGEST_RANK = 512
LOSS_CHUNK = 256


@dataclass(frozen=True)
class Budget:
    """What may be used: bytes of memory, or a share of the base's parameters.

    Attributes:
        text: As it was given.
        memory: Bytes, or None.
        share: Of the parameters, or None.
    """

    text: str
    memory: int | None = None
    share: float | None = None


def parse_budget(text: str) -> Budget:
    """``24GB``, ``16 GiB``, ``800M`` or ``1%``.

    Raises:
        ConfigError: It is neither.
    """
    word = text.strip()
    if word.endswith("%"):
        try:
            share = float(word[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise ConfigError(f"a budget in percent lies above 0% and at most at 100%, not {text!r}")
        return Budget(word, share=share)
    found = _SIZE.fullmatch(word)
    if found is None:
        raise ConfigError(
            f"a budget is a size such as 24GB, or a share of the parameters such as 1%, not {text!r}"
        )
    number, unit, binary = found[1], found[2].lower(), found[3]
    memory = int(float(number) * (_BINARY if binary and unit else _UNITS)[unit])
    if not unit and memory < 10**6:
        raise ConfigError(f"a budget of {text!r} lacks its unit: 24GB, 800MB, or a share such as 1%")
    return Budget(word, memory=memory)


@dataclass(frozen=True)
class Proposal:
    """Settings that keep to a budget.

    Attributes:
        config: The adapter.
        options: Of `estimate_memory`: batch size, quantisation and the rest.
        estimate: What they take.
        given_up: What was changed to get there, in words.
    """

    config: LoraConfig
    options: dict[str, Any]
    estimate: MemoryEstimate
    given_up: tuple[str, ...] = ()


def propose(
    model: nn.Module,
    config: LoraConfig,
    budget: Budget | str,
    *,
    fixed: Collection[str] = (),
    **options: Any,
) -> Proposal:
    """Settings under which training keeps to a budget.

    Of memory: first gradients are checkpointed, then logits are computed in chunks, then batches become
    smaller (with as many more of them an optimizer step), then the base is quantised to 4 bits, then the rank
    falls, and at last only the model's usual targets are adapted. The first that leaves 5 % free is taken.
    Of parameters: the highest rank that keeps to it, on the given targets or else on the usual ones.

    Args:
        model: As for `estimate_memory`.
        config: The adapter to begin with.
        budget: Bytes or share, or its text.
        fixed: Names that may not be changed: ``r``, ``target_modules``, ``quantize``, ``batch_size``,
            ``gradient_checkpointing``, ``loss_chunk_size``.
        **options: Of `estimate_memory`, to begin with.

    Raises:
        TrainingError: Nothing keeps to it; says what the least would be.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    if budget.share is not None:
        return _within_share(model, config, budget, set(fixed), options)
    return _within_memory(model, config, budget, set(fixed), options)


def _within_memory(
    model: nn.Module, config: LoraConfig, budget: Budget, fixed: set[str], options: dict[str, Any]
) -> Proposal:
    room = int((budget.memory or 0) * (1 - SPARE))
    sizes = _Sizes(model, config.r)
    least: tuple[int, LoraConfig, dict[str, Any]] | None = None
    smallest = None
    for adapter, chosen, given_up in _candidates(model, config, fixed, options):
        base = sizes.base(chosen["quantize"])
        smallest = base if smallest is None else min(base, smallest)
        if base > room:
            continue
        foreseen = sizes.peak(adapter, chosen, room)
        if least is None or foreseen < least[0]:
            least = foreseen, adapter, chosen
        if foreseen > room:
            continue
        estimate = estimate_memory(model, adapter, **chosen)
        if estimate.peak <= room:
            return Proposal(adapter, chosen, estimate, given_up)
    held = Text(" Kept as given: ", Text.join(", ", map(Hint, sorted(fixed))), ".") if fixed else ""
    if least is None:
        raise TrainingError(
            f"nothing fits into {budget.text}: the base alone takes {_gigabytes(smallest or 0)}"
            f"{'' if 'quantize' in fixed else ' even in 4 bits'}.",
            held,
            " Take a smaller model, or more memory",
        )
    peak, adapter, chosen = least
    raise TrainingError(
        f"nothing fits into {budget.text}, of which 5 % are to stay free: the least found takes "
        f"{_gigabytes(peak)}, of which {_gigabytes(sizes.base(chosen['quantize']))} are the base, with rank "
        f"{adapter.r}, ",
        Hint("batch_size", chosen["batch_size"]),
        f", {chosen['quantize'] or 'no'} quantisation.",
        held,
        f" Shorter examples (of {options.get('sequence_length', 1024)} tokens now), a smaller model or more "
        "memory would help",
    )


def _candidates(
    model: nn.Module, config: LoraConfig, fixed: set[str], options: dict[str, Any]
) -> Iterator[tuple[LoraConfig, dict[str, Any], tuple[str, ...]]]:
    """From what was asked for to ever less of it."""
    batch = options.get("batch_size", 8)
    steps = options.get("gradient_accumulation_steps", 1)
    chunk = options.get("loss_chunk_size", 0)
    # (checkpointing, chunk, batch), each but the first giving up one thing more
    ladder: list[tuple[bool, int, int]] = [(bool(options.get("gradient_checkpointing")), chunk, batch)]
    if "gradient_checkpointing" not in fixed:
        ladder.append((True, chunk, batch))
    if "loss_chunk_size" not in fixed and config.task_type == "CAUSAL_LM" and not chunk:
        ladder.append((ladder[-1][0], LOSS_CHUNK, batch))
    if "batch_size" not in fixed:
        smaller = batch
        while smaller > 1:
            smaller //= 2
            ladder.append((*ladder[-1][:2], smaller))
    ladder = list(dict.fromkeys(ladder))
    kinds = [options.get("quantize")]
    if "quantize" not in fixed and kinds == [None]:
        kinds.append("nf4")
    ranks = [config.r] if "r" in fixed else [config.r, *(r for r in RANKS if r < config.r)]
    for adapter, narrowed in _targets(model, config, fixed):
        for r in ranks:
            if (r != ranks[0] or narrowed) and kinds[-1] != kinds[0]:
                usable: list[str | None] = [kinds[-1]]
            else:
                usable = kinds
            for quantize in usable:
                # Once rank or targets give way, all before has given way already.
                steps_down = ladder if r == ranks[0] and not narrowed else ladder[-1:]
                for checkpointing, chunks, rows in steps_down:
                    chosen = options | {
                        "gradient_checkpointing": checkpointing,
                        "loss_chunk_size": chunks,
                        "batch_size": rows,
                        "gradient_accumulation_steps": max(1, steps * batch // rows),
                        "quantize": quantize,
                    }
                    said = []
                    if checkpointing and not ladder[0][0]:
                        said.append("activations are computed again in the backward pass")
                    if chunks and not ladder[0][1]:
                        said.append("logits are computed in chunks")
                    if rows < batch:
                        said.append(f"batches of {rows} instead of {batch}, and more of them a step")
                    if quantize and quantize != kinds[0]:
                        said.append(f"the base is kept in 4 bits ({quantize})")
                    if r < config.r:
                        said.append(f"rank {r} instead of {config.r}")
                    if narrowed:
                        said.append("fewer targets")
                    yield _of_rank(adapter, r), chosen, tuple(said)


def _targets(model: nn.Module, config: LoraConfig, fixed: set[str]) -> Iterator[tuple[LoraConfig, bool]]:
    yield config, False
    kind = getattr(getattr(model, "config", None), "model_type", None)
    usual = DEFAULT_TARGETS.get(kind or "")
    if "target_modules" not in fixed and usual is not None and config.target_modules != usual:
        yield (
            dataclasses.replace(config, target_modules=usual if isinstance(usual, str) else list(usual)),
            True,
        )


def _of_rank(config: LoraConfig, r: int) -> LoraConfig:
    """The adapter with another rank and the same scaling."""
    if r == config.r:
        return config
    power = 0.5 if config.use_rslora else 1.0
    alpha = config.lora_alpha * (r / config.r) ** power
    return dataclasses.replace(config, r=r, lora_alpha=int(alpha) if alpha == int(alpha) else alpha)


class _Sizes:
    """Peaks foreseen from few traces: beyond what always stands there, a step grows with its rows."""

    def __init__(self, model: nn.Module, r: int) -> None:
        self.model, self.r = model, r
        self._seen: dict[str, MemoryEstimate] = {}

    def peak(self, config: LoraConfig, options: dict[str, Any], room: int) -> int:
        """Bytes; where one row is too much already, those of one row."""
        rows, padded = options["batch_size"], options.get("padded")
        padded = rows > 1 if padded is None else padded
        # Quantisation and rank change what stands there; what rank adds to activations is of no size.
        share, config = config.r / self.r, _of_rank(config, self.r)
        one = self._estimate(
            config,
            {
                **options,
                "batch_size": 1,
                "padded": padded,
                "quantize": None,
                "gradient_accumulation_steps": 1,
            },
        )
        standing = self.base(options["quantize"]) + share * (one.factors + one.optimizer)
        beyond = one.peak - _standing(one)
        foreseen = int(standing + beyond - (1 - share) * one.gradients)
        if rows == 1 or foreseen > room:
            return foreseen
        two = self._estimate(
            config,
            {
                **options,
                "batch_size": 2,
                "padded": padded,
                "quantize": None,
                "gradient_accumulation_steps": 1,
            },
        )
        return foreseen + int((rows - 1) * (two.peak - _standing(two) - beyond))

    def base(self, quantize: str | None) -> int:
        """Bytes of the base."""
        return base_bytes(self.model, quantize)[0]

    def _estimate(self, config: LoraConfig, options: dict[str, Any]) -> MemoryEstimate:
        key = repr((config.target_modules, sorted(options.items(), key=str)))
        if key not in self._seen:
            self._seen[key] = estimate_memory(self.model, config, **options)
        return self._seen[key]


def _standing(estimate: MemoryEstimate) -> int:
    return estimate.base + estimate.factors + estimate.optimizer


def _within_share(
    model: nn.Module, config: LoraConfig, budget: Budget, fixed: set[str], options: dict[str, Any]
) -> Proposal:
    share = budget.share or 0.0
    total = sum(p.numel() for p in model.parameters())
    room = int(share * total)
    least = None
    for adapter, narrowed in _targets(model, config, fixed):
        one, two = (_trainable(model, _of_rank(adapter, r)) for r in (1, 2))
        each, rest = max(1, two - one), one - (two - one)
        at_least = _trainable(model, adapter) if "r" in fixed else one
        least = at_least if least is None else min(least, at_least)
        r = adapter.r if "r" in fixed else min(LARGEST_RANK, (room - rest) // each)
        if r >= 16:
            r -= r % 8  # kernels like multiples of 8
        if r < 1 or at_least > room:
            continue
        chosen = _of_rank(adapter, r)
        said = (f"rank {chosen.r} instead of {config.r}",) if chosen.r != config.r else ()
        return Proposal(
            chosen,
            dict(options),
            estimate_memory(model, chosen, **options),
            (*said, *(("fewer targets",) if narrowed else ())),
        )
    raise TrainingError(
        f"nothing keeps to {budget.text} of {total:,} parameters, which are {room:,}: the smallest adapter "
        f"found has {least:,} ({(least or 0) / max(1, total):.3%}). Name fewer ",
        Hint("target_modules"),
    )


def _trainable(model: nn.Module, config: LoraConfig) -> int:
    return sum(p.numel() for p in adapt_shadow(model, config).parameters() if p.requires_grad)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 10**9 else f"{count / 1e6:.3g} MB"
