"""The settings of one adapter on one module, with every pattern resolved and every name normalised."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.config import LoraConfig, init_options, variants_of
from veneer.config.expressions import Paths, TooManySteps
from veneer.config.values import LARGEST_NUMBER, name_in, show
from veneer.errors import ConfigError, Hint


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
        init_config: Options of the initialisation (a `LoftQConfig`, `EvaConfig`, …), None if it has none.
        constant_scaling: Keep the scaling at 1 and put the strength of tensors that are swapped in into B,
            so that a compiled model always sees the same number.
        parameter: Name of the bare parameter that ``path`` ends in, empty for a module.
        owner: Path of the module that this one is adapted along with, and whose rank and strength it has.
        times: How many times the update is added.

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
        if not abs(self.scaling) <= LARGEST_NUMBER:
            raise ConfigError(
                f"the strength of adapter {self.adapter!r} on {self.path!r} is {self.scaling:.4g}, which "
                "float32 cannot hold: ",
                Hint("lora_alpha"),
                f" is {self.lora_alpha:.4g}, ",
                Hint("r"),
                f" is {self.r}",
            )

    @property
    def scaling(self) -> float:
        """The initial strength: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.

        Source: https://arxiv.org/abs/2106.09685 section 4.1; the root from https://arxiv.org/abs/2312.03732.
        """
        return self.times * self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class PatternSet:
    """Patterns in order. Finds those that match a path: names by lookup, regular expressions by trying.

    Args:
        patterns: Names, ends of dotted paths, full paths, or regular expressions.
        option: The option of the configuration that they come from, for errors.
        anywhere: Let an expression match the end of a path after any dot, as PEFT does for ``rank_pattern``;
            otherwise it must match the whole path, as for ``target_modules``.
        inside: Let a name match the end of a path even without a dot before it, as PEFT does for
            ``modules_to_save``.
    """

    def __init__(
        self, patterns: Iterable[str], option: str, *, anywhere: bool = False, inside: bool = False
    ) -> None:
        self.patterns = tuple(patterns)
        self.option, self._anywhere, self._inside = option, anywhere, inside
        self._ends: dict[str, list[int]] = {}
        self._paths: dict[str, list[int]] = {}
        self._expressions: list[tuple[int, str]] = []
        for index, pattern in enumerate(self.patterns):
            self._ends.setdefault(pattern, []).append(index)
            name = name_in(pattern)
            if name is None:
                self._expressions.append((index, pattern))
            elif name != pattern:
                table = self._ends if anywhere and not pattern.startswith("^") else self._paths
                table.setdefault(name, []).append(index)
        self._lengths = sorted({len(end) for end in self._ends})

    def over(self, paths: Paths) -> dict[str, list[int]]:
        """The indices of all patterns that match each path, in the order of the patterns.

        Raises:
            ConfigError: If the expressions take too many steps.
        """
        if not self.patterns:
            return {path: [] for path in paths.paths}
        found = {path: self._by_name(path, ends) for path, ends in paths.ends.items()}
        for index, expression in self._expressions:
            try:
                matching = paths.matching(expression, anywhere=self._anywhere)
            except TooManySteps:
                raise ConfigError(
                    Hint(self.option),
                    f": {show(expression)} has too many ways to match, alone or with the other "
                    "expressions of the configuration: name the modules instead, or write it without a "
                    "repetition inside another",
                ) from None
            for path in matching:
                found[path].append(index)
        return {path: sorted(set(hits)) if hits else hits for path, hits in found.items()}

    def _by_name(self, path: str, ends: Sequence[str]) -> list[int]:
        found = list(self._paths.get(path, ()))
        if self._inside:
            for length in self._lengths:
                found += self._ends.get(path[-length:], ()) if length <= len(path) else ()
            return found
        for end in ends:
            if end in self._ends:
                found += self._ends[end]
        return found


def specs_under(config: LoraConfig, specs: Iterable[LoraSpec]) -> list[LoraSpec]:
    """The specs that another configuration would give to the modules of one adapter."""
    specs = list(specs)
    parameters = {spec.owner or spec.path: spec.parameter for spec in specs}
    new = resolve_all(config, specs[0].adapter if specs else "", parameters)
    return [
        replace(new[spec.owner or spec.path], path=spec.path, owner=spec.owner, times=spec.times)
        for spec in specs
    ]


def variant_name(config: LoraConfig) -> str:
    """The name of the variant that a configuration asks for, ``"plain"`` for none.

    Raises:
        ConfigError: If it asks for several.
    """
    names = variants_of(config)
    if len(names) > 1:
        raise ConfigError(f"the variants {', '.join(names)} cannot be combined: choose one")
    return names[0] if names else "plain"


def restate(config: LoraConfig, specs: Iterable[LoraSpec]) -> None:
    """Write the ranks and strengths of an adapter's modules into a configuration.

    The most frequent values become ``r`` and ``lora_alpha``; every other module gets a pattern.
    """
    specs = [spec for spec in specs if not spec.owner]
    ranks, alphas = Counter(s.r for s in specs), Counter(s.lora_alpha for s in specs)
    config.r, config.lora_alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    config.use_rslora = bool(specs) and specs[0].use_rslora
    config.rank_pattern = {f"^{s.path}$": s.r for s in specs if s.r != config.r}
    config.alpha_pattern = {f"^{s.path}$": s.lora_alpha for s in specs if s.lora_alpha != config.lora_alpha}


def alpha_of(scaling: float, r: int, use_rslora: bool) -> float:
    """The ``lora_alpha`` of a strength; one that is a whole number but for the last digits is made whole."""
    alpha = scaling * (math.sqrt(r) if use_rslora else r)
    near = round(alpha)
    return near if math.isclose(near, alpha, rel_tol=1e-14) else alpha


def resolve(config: LoraConfig, adapter: str, path: str, parameter: str = "") -> LoraSpec:
    """The spec of the module at ``path``; see `resolve_all`."""
    return resolve_all(config, adapter, {path: parameter})[path]


def resolve_all(
    config: LoraConfig, adapter: str, parameters: Mapping[str, str], paths: Paths | None = None
) -> dict[str, LoraSpec]:
    """The specs of modules, by path: rank and strength come from the first pattern that matches.

    Args:
        config: The configuration.
        adapter: The adapter's name.
        parameters: Paths of the modules, each with the name of its bare parameter, or "".
        paths: These paths, and perhaps others, with the results of patterns that were tried on them before.

    Raises:
        ConfigError: If the configuration asks for several variants, or its expressions take too many steps.
    """
    paths = paths or Paths(list(parameters))
    ranks = PatternSet(config.rank_pattern, "rank_pattern", anywhere=True).over(paths)
    alphas = PatternSet(config.alpha_pattern, "alpha_pattern", anywhere=True).over(paths)
    rank_of, alpha_of = list(config.rank_pattern.values()), list(config.alpha_pattern.values())
    init = config.init_lora_weights
    init = init if isinstance(init, bool) else init.lower()
    variant, init_config = variant_name(config), init_options(config)
    return {
        path: LoraSpec(
            path=path,
            parameter=parameter,
            adapter=adapter,
            lora_dropout=config.lora_dropout,
            init=init,
            variant=variant,
            use_rslora=config.use_rslora,
            lora_bias=config.lora_bias,
            init_config=init_config,
            r=rank_of[ranks[path][0]] if ranks[path] else config.r,
            lora_alpha=alpha_of[alphas[path][0]] if alphas[path] else config.lora_alpha,
        )
        for path, parameter in parameters.items()
    }
