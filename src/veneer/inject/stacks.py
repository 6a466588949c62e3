"""Experts that a model holds as stacks: the names that each had as a module, taken as targets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from veneer import layers
from veneer.config import LoraConfig
from veneer.config.expressions import Paths
from veneer.config.values import show
from veneer.errors import Hint, TargetError
from veneer.expert_layouts.layouts import STACKS
from veneer.module_names import portable_targets
from veneer.spec import PatternSet
from veneer.targets import ALL_LINEAR
from veneer.wording import listed, warn

#: The names of an expert's projections, with the stack and the part of it that holds them today.
PARTS = {
    name: (stack, half)
    for stack, halves in STACKS.items()
    for half, names in enumerate(halves)
    for name in names
}
_LIKE_QWEN = """
    afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo
    glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe
    qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open
""".split()
#: Model types whose experts PEFT 0.21 finds under the names that they had in transformers 4.
OLD_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), ("w1", "w3", "w2")),
    **dict.fromkeys(_LIKE_QWEN, ("gate_proj", "up_proj", "down_proj")),
}


def holds_stacks(module: nn.Module) -> bool:
    return STACKS.keys() <= module._parameters.keys()


def old_names(bases: Mapping[str, nn.Module], model_type: str | None) -> tuple[str, ...]:
    """The old names that mean a model's stacks of experts; empty for models that have none."""
    names = OLD_NAMES.get(model_type or "", ())
    return names if names and any(map(holds_stacks, bases.values())) else ()


def name_stacks(
    config: LoraConfig, bases: Mapping[str, nn.Module], model_type: str | None, *, quiet: bool
) -> None:
    """Write the stacks that ``target_modules`` means into ``target_parameters``, as PEFT does.

    ``"all-linear"`` means the experts and what chooses them, and old names mean the experts where no module
    is called so. Gate and up of an expert, of rank r each, become one update of rank 2r and of the same
    strength.

    Args:
        config: The configuration, which is written to.
        bases: The modules of the model by path, without adapters.
        model_type: The model's type in the sense of transformers.
        quiet: Say nothing of what is taken for another thing, or left out.

    Raises:
        TargetError: If gate or up is named without the other.
    """
    holders = [path for path, base in bases.items() if holds_stacks(base)]
    given = config.target_modules
    if not holders or given is None:
        return
    patterns = [given] if isinstance(given, str) else sorted(given)
    wildcard = any(pattern.lower() == ALL_LINEAR for pattern in patterns)
    names = old_names(bases, model_type)
    parts = {f"{path}.{name}": f"{path}.{stack}" for path in holders for name, (stack, _) in PARTS.items()}
    routers = dict(routers_of(holders, bases)) if names else {}
    hits = PatternSet(patterns, "target_modules").over(Paths([*parts, *bases]))
    modules = {_last(path) for path in bases if hits[path] and path not in routers}
    named = {path for path in (*parts, *routers) if wildcard or hits[path]}
    excluded = _excluded(config, [*holders, *routers])
    named = {path for path in named if not excluded & {path, _around(path)}}
    meant = {path for path in named if _last(path) in names and (wildcard or _last(path) not in modules)}
    meant |= named & routers.keys()
    for holder in holders:
        _refuse_halves({_last(path) for path in meant if _around(path) == holder}, names)
    found = {(parts | routers)[path] for path in meant}
    if not quiet:
        _mention_left_out(config, {parts[path]: None for path in parts if path in named}.keys() - found)
        if wildcard:
            _mention_modules(bases, names)
    if not found:
        return
    if not wildcard:
        elsewhere = {i for path in bases if path not in routers for i in hits[path]}
        only = {patterns[i] for path in meant for i in hits[path] if i not in elsewhere}
        config.target_modules = [] if given in only else given if isinstance(given, str) else {*given} - only
        if not quiet:
            _mention_meant(meant, found)
    config.target_parameters = sorted({*(config.target_parameters or ()), *names_of_parameters(found, bases)})
    _widen(config, [path for path in found if len(STACKS.get(_last(path), ())) > 1])


def names_of_parameters(paths: Collection[str], bases: Mapping[str, nn.Module]) -> list[str]:
    """The names by which a file means these parameters and no others."""
    every = {f"{path}.{name}" for path, base in bases.items() for name in base._parameters}
    names = portable_targets(paths, every.difference(paths))
    return sorted(paths if isinstance(names, str) else names)


def _widen(config: LoraConfig, paths: Sequence[str]) -> None:
    """Give stacks that join two projections twice the rank, unless the configuration says another."""
    patterns = PatternSet([*config.rank_pattern, *config.alpha_pattern], "rank_pattern", anywhere=True)
    if not paths or any(patterns.over(Paths(list(paths))).values()):
        return
    key = rf".*\.{_last(paths[0])}"
    times = 2**0.5 if config.use_rslora else 2
    config.rank_pattern = {**config.rank_pattern, key: 2 * config.r}
    config.alpha_pattern = {**config.alpha_pattern, key: times * config.lora_alpha}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _around(path: str) -> str:
    return path.rpartition(".")[0]


def routers_of(holders: Iterable[str], bases: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Modules that choose experts by a bare matrix, by their path, with that of the matrix."""
    for holder in holders:
        path = f"{_around(holder)}.gate"
        base = bases.get(path)
        if base is not None and layers.find(base) is None and "weight" in base._parameters:
            yield path, f"{path}.weight"


def _excluded(config: LoraConfig, paths: Sequence[str]) -> set[str]:
    excluded = config.exclude_modules or ()
    patterns = PatternSet([excluded] if isinstance(excluded, str) else sorted(excluded), "exclude_modules")
    return {path for path, hits in patterns.over(Paths(paths)).items() if hits}


def _refuse_halves(named: Collection[str], names: Sequence[str]) -> None:
    for stack in STACKS:
        wanted = [name for name in names if PARTS[name][0] == stack]
        absent = [name for name in wanted if name not in named]
        if absent and len(absent) < len(wanted):
            raise TargetError(
                Hint("target_modules"),
                f" names {listed(sorted(set(wanted) & set(named)))} without {listed(absent)}: the experts of "
                f"this model hold them in one parameter, {stack}. Name both",
            )


def _mention_meant(meant: Iterable[str], found: Iterable[str]) -> None:
    names = sorted({_last(path) for path in meant})
    ends = sorted({".".join(path.split(".")[-2:]) for path in found})
    warn(
        Hint("target_modules"),
        f" {', '.join(names)}: this model holds what went by these names as parameters, which are adapted in "
        "their place, as in PEFT: ",
        Hint("target_parameters"),
        f" {', '.join(ends)}",
    )


def _mention_left_out(config: LoraConfig, stacks: Collection[str]) -> None:
    """Warn of stacks that targets name in vain."""
    taken = {_last(path) for path in config.target_parameters or ()}
    left = sorted(path for path in stacks if _last(path) not in taken)
    if left:
        given = config.target_modules
        warn(
            Hint("target_modules"),
            f" {show(given if isinstance(given, str) else sorted(given or ()))} leaves out the experts at "
            f"{listed(dict.fromkeys(map(_around, left)), 1)}, which are parameters: name them in ",
            Hint("target_parameters"),
            f" ({listed(dict.fromkeys(map(_last, left)))})",
        )


def _mention_modules(bases: Mapping[str, nn.Module], names: Collection[str]) -> None:
    """Warn of linear layers that are called as experts were, which ``"all-linear"`` leaves out."""
    left = [path for path, base in bases.items() if _last(path) in names and layers.find(base) is not None]
    if left:
        warn(
            Hint("target_modules", ALL_LINEAR),
            f" leaves out {listed(left)}: beside stacks of experts PEFT takes these names for theirs. List "
            "the targets by name to adapt both",
        )
