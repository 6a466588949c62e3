"""What ONE module gets from ONE adapter: every pattern resolved, every name normalised, frozen."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.config import LoraConfig, init_options, looks_like_regex, variants_of
from veneer.errors import ConfigError


@dataclass(frozen=True)
class LoraSpec:
    """One adapter on one module.

    Args:
        path: Dotted path of the module in the model.
        adapter: Name of the adapter.
        r: Rank of the update, at least 1.
        lora_alpha: Numerator of the scale.
        lora_dropout: Probability of dropping an element of the branch's input.
        init: True, False, or the lower-case name of an initialisation.
        variant: ``"plain"`` or the name of another way to combine W and the update.
        use_rslora: Divide by the square root of the rank.
        lora_bias: Give B a trainable bias.
        variant_options: What the variant read from the configuration; see `Variant.options`.
        init_config: Options of that initialisation (a `LoftQConfig`, `EvaConfig`, …), None where it has none.
        constant_scaling: Tensors that take this adapter's place bring their strength in B, so that a compiled
            model sees one number for ever.
        parameter: Name of the bare parameter that ``path`` ends in, empty for a module.
        owner: Path of the module that it is adapted along with, whose rank and strength it takes.
        times: How often the update counts.

    Raises:
        ConfigError: For a rank below 1.
    """

    path: str
    adapter: str
    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    init: bool | str = True
    variant: str = "plain"
    use_rslora: bool = False
    lora_bias: bool = False
    variant_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    init_config: Any = None
    constant_scaling: bool = False
    parameter: str = ""
    owner: str = ""
    times: int = 1

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(
                f"the rank of adapter {self.adapter!r} on {self.path!r} must be at least 1, got {self.r}"
            )

    @property
    def scaling(self) -> float:
        """The initial strength: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.

        Source: https://arxiv.org/abs/2106.09685 section 4.1; the root from https://arxiv.org/abs/2312.03732.
        """
        return self.times * self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def under(self, config: LoraConfig) -> LoraSpec:
        """What the same module would get from another configuration."""
        spec = resolve(config, self.adapter, self.owner or self.path, self.parameter)
        return replace(spec, path=self.path, owner=self.owner, times=self.times)


class PatternSet:
    """Patterns in order, and which of them match a path: names by lookup, only expressions are tried.

    Args:
        patterns: Names, ends of dotted paths, full paths, or regular expressions.
        anywhere: Let an expression match the end of a path after any dot, as the field does for
            ``rank_pattern``; otherwise it must match the whole path, as for ``target_modules``.
    """

    def __init__(self, patterns: Sequence[str], *, anywhere: bool = False) -> None:
        self.patterns = tuple(patterns)
        self._ends: dict[str, int] = {}
        self._paths: dict[str, list[int]] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for index, pattern in enumerate(self.patterns):
            self._ends.setdefault(pattern, index)
            whole = pattern.removeprefix("^").removesuffix("$")
            if not looks_like_regex(pattern):
                continue
            if pattern.startswith("^") and not looks_like_regex(whole):
                self._paths.setdefault(whole, []).append(index)
            else:
                source = rf"(?:.*\.)?(?:{pattern})" if anywhere else pattern
                self._expressions.append((index, re.compile(source)))

    def hits(self, path: str) -> list[int]:
        """The indices of all patterns that match, in the order of the patterns."""
        if not self.patterns:
            return []
        found = set(self._paths.get(path, ()))
        end = path
        while True:
            if (index := self._ends.get(end)) is not None:
                found.add(index)
            _, dot, end = end.partition(".")
            if not dot:
                break
        found.update(index for index, expression in self._expressions if expression.fullmatch(path))
        return sorted(found)

    def first(self, path: str) -> str | None:
        """The first pattern that matches, or None."""
        hits = self.hits(path)
        return self.patterns[hits[0]] if hits else None


@functools.lru_cache(maxsize=64)
def module_patterns(patterns: tuple[str, ...]) -> PatternSet:
    """Patterns of ``rank_pattern`` and ``alpha_pattern``: for the end of a path, by name or expression."""
    return PatternSet(patterns, anywhere=True)


def variant_name(config: LoraConfig) -> str:
    """The name of the variant that a configuration asks for, ``"plain"`` for none.

    Raises:
        ConfigError: If it asks for several.
    """
    asked = variants_of(config)
    if len(asked) > 1:
        raise ConfigError(f"the variants {', '.join(asked)} cannot be combined: choose one")
    return asked[0] if asked else "plain"


def restate(config: LoraConfig, specs: Iterable[LoraSpec]) -> None:
    """Write into a configuration the ranks and strengths that an adapter's modules have.

    What most modules have becomes ``r`` and ``lora_alpha``; the rest gets a pattern each.
    """
    given = [spec for spec in specs if not spec.owner]
    ranks, alphas = Counter(s.r for s in given), Counter(s.lora_alpha for s in given)
    config.r, config.lora_alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    config.use_rslora = bool(given) and given[0].use_rslora
    config.rank_pattern = {f"^{s.path}$": s.r for s in given if s.r != config.r}
    config.alpha_pattern = {f"^{s.path}$": s.lora_alpha for s in given if s.lora_alpha != config.lora_alpha}


def resolve(config: LoraConfig, adapter: str, path: str, parameter: str = "") -> LoraSpec:
    """What the module at ``path`` gets: rank and strength of the first pattern that matches, or the default.

    Raises:
        ConfigError: If the configuration asks for several variants.
    """
    rank_key = module_patterns(tuple(config.rank_pattern)).first(path)
    alpha_key = module_patterns(tuple(config.alpha_pattern)).first(path)
    init = config.init_lora_weights
    init = init if isinstance(init, bool) else init.lower()
    return LoraSpec(
        path=path,
        parameter=parameter,
        adapter=adapter,
        r=config.r if rank_key is None else config.rank_pattern[rank_key],
        lora_alpha=config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key],
        lora_dropout=config.lora_dropout,
        init=init,
        variant=variant_name(config),
        use_rslora=config.use_rslora,
        lora_bias=config.lora_bias,
        init_config=init_options(config),
    )
