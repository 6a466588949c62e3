"""Checking the laws on a plug-in."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from veneer.backends import Backend
from veneer.errors import ConfigError, TargetError
from veneer.inits import Init
from veneer.layers import LoraLayer
from veneer.merge import refuses_merge
from veneer.testing.laws import LAWS
from veneer.testing.made import LayerCase, Made
from veneer.variants import Variant
from veneer.wording import first_line

#: The cases if none are given.
CASES: tuple[LayerCase, ...] = (
    LayerCase("Linear", partial(nn.Linear, 12, 10), partial(torch.randn, 3, 12)),
    LayerCase("Linear without bias", partial(nn.Linear, 12, 10, bias=False), partial(torch.randn, 2, 3, 12)),
    LayerCase("Linear of an empty batch", partial(nn.Linear, 12, 10), partial(torch.randn, 0, 12)),
    LayerCase("Embedding", partial(nn.Embedding, 11, 8), partial(torch.randint, 0, 11, (3, 5))),
    LayerCase("Conv1d", partial(nn.Conv1d, 4, 6, 3, dilation=2), partial(torch.randn, 2, 4, 9)),
    LayerCase("Conv2d", partial(nn.Conv2d, 4, 6, 3, stride=2, padding=1), partial(torch.randn, 2, 4, 9, 7)),
    LayerCase("Conv2d with groups", partial(nn.Conv2d, 4, 6, 3, groups=2), partial(torch.randn, 2, 4, 9, 7)),
)


@dataclass
class Report:
    """What `check` found.

    Attributes:
        tried: ``(law, case, dtype)`` of each law that holds.
        refused: Cases that Veneer refuses for what is checked, with the reason.
        broken: Each law that does not: ``law on case in dtype: error``.
    """

    tried: list[tuple[str, str, torch.dtype]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


class LawBroken(AssertionError):
    """Some laws do not hold; all of them are named."""


def check(
    item: type[Variant] | type[Init] | type[Backend] | type[LoraLayer],
    *,
    cases: Sequence[LayerCase] = CASES,
    options: Mapping[str, Any] | None = None,
    store: Callable[[nn.Module], nn.Module] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Report:
    """Check a variant, initialisation, backend or layer against every law that Veneer's own parts obey.

    Args:
        item: The class; defining it has registered it.
        cases: Layers to check it on. A layer class needs its own, of the types that it wraps.
        options: Options of the configuration besides those that ask for it (``variant_options``).
        store: For a backend: converts an ordinary module to its storage, and returns the result.
        dtypes: Of the base layers.

    Returns:
        What was checked and what was refused.

    Raises:
        LawBroken: Naming every law that does not hold, and on what.
        ConfigError: Nothing could be checked at all.

    Example:
        >>> from veneer.testing import check
        >>> from veneer.variants.plain import Plain
        >>> len(check(Plain).broken)
        0
    """
    if not __debug__:
        raise ConfigError("the laws are assertions: run without python -O")
    asked = [{**own, **(options or {})} for own in _asking_for(item)]
    report = Report()
    for case in cases:
        for number, dtype in enumerate(dtypes):
            for choice in asked:
                _try_all(Made(case, choice, store or _as_it_is, dtype), number == 0, report)
    if report.broken:
        raise LawBroken(f"{len(report.broken)} laws do not hold:\n" + "\n".join(report.broken))
    if not report.tried:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.refused.items())
        raise ConfigError(f"nothing could be tried on {item.__name__}: {reasons or 'no cases'}")
    return report


def _try_all(made: Made, first: bool, report: Report) -> None:
    name = made.case.name
    try:
        layer = made.layer()
    except (TargetError, ConfigError) as error:
        report.refused[name] = str(error)
        return
    mergeable = not made.case.unmergeable and not refuses_merge(layer, ["default"])
    for law in LAWS:
        if (law.once and not first) or (law.mergeable and not mergeable):
            continue
        try:
            law.holds(made)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = first_line(error) if str(error).strip() else where.line
            report.broken.append(f"  {law.name} on {name} in {made.dtype}: {type(error).__name__}: {reason}")
        else:
            report.tried.append((law.name, name, made.dtype))


def _asking_for(item: Any) -> list[dict[str, Any]]:
    if issubclass(item, Variant):
        return [{} if item.name == "plain" else {"variant": item.name}]
    if issubclass(item, Init):
        return [{"init_lora_weights": name} for name in item.names]
    if issubclass(item, (Backend, LoraLayer)):
        return [{}]
    raise ConfigError(f"{item!r} is not a Variant, Init, Backend or LoraLayer")


def _as_it_is(module: nn.Module) -> nn.Module:
    return module
