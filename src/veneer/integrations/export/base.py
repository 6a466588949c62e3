"""What every target says of itself; a class with a name registers by being defined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from ...errors import ConfigError, ExportError, Text
from ...registry import NameRegistry
from ...wording import listed
from .folding import Folded, Rules
from .options import no_target
from .source import FEATURES, Source, Update, variant_problem
from .ways import WAYS, merging

#: What any target does with these by multiplying B and by padding with zeros.
FOLDED = ("use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Problem:
    """One thing that a target cannot express.

    Attributes:
        reason: What, and where.
        way: Another way out than merging, if there is one.
    """

    reason: str
    way: Text | None = None


@dataclass(frozen=True)
class Part:
    """What is written of one adapter: a source, brought to the target's scale.

    Attributes:
        source: Where it comes from.
        folded: Its updates.
        component: What part of a pipeline it adapts, for the targets that know such parts.
        biases: Module path -> bias of the base with ``s·b`` of lora_bias added, where that was folded.
    """

    source: Source
    folded: Folded
    component: str = ""
    biases: Mapping[str, Tensor] = field(default_factory=dict)


class Target(ABC):
    """A reader of adapters and the files that it takes.

    Attributes:
        name: What ``target=`` and ``--target`` take.
        reader: Who reads it, in words.
        rules: How it scales.
        keeps: The features of `FEATURES` that its files express as they are.
        files: Names of the files that it may write.
        ways: Feature -> a way out, other than merging, where it is not kept.
    """

    name: ClassVar[str] = ""
    reader: ClassVar[str] = ""
    rules: ClassVar[Rules] = Rules()
    keeps: ClassVar[frozenset[str]] = frozenset()
    files: ClassVar[tuple[str, ...]] = ()
    ways: ClassVar[Mapping[str, Text]] = MappingProxyType(WAYS)
    #: Variant -> why its files are not written, where another reason than that they have no place for it.
    variants: ClassVar[Mapping[str, str]] = MappingProxyType({})
    #: Whether copies of embeddings are written that were saved with the adapter.
    takes_copies: ClassVar[bool] = False
    #: Features that are taken on a condition, which `more_problems` looks at, in a few words.
    sometimes: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__ and cls.name:
            targets.add(cls.name, cls())

    def problems(self, source: Source) -> list[Problem]:
        """Everything that the target's files cannot express of an adapter."""
        found = []
        own = variant_problem(source, self.variants)
        if own is not None:
            found.append(Problem(own))
        for feature, names in source.features().items():
            if feature in self.keeps or feature in FOLDED or feature in self.sometimes:
                continue
            found.append(
                Problem(
                    f"{FEATURES[feature]}: {listed(names)}",
                    self.ways.get(feature),
                )
            )
        return found + self.more_problems(source)

    def more_problems(self, source: Source) -> list[Problem]:
        """What depends on more than the kind of feature."""
        return []

    def prepared(self, source: Source) -> tuple[Source, dict[str, Tensor], list[Problem]]:
        """The adapter without what the target takes in another form, such as biases of B.

        Returns:
            The adapter, module path -> bias of the layer with that of B in it, and what stands in the way.
        """
        return source, {}, []

    def component(self, source: Source, given: str | None) -> str:
        """What part of a pipeline the adapter belongs to; empty where the target knows none.

        Raises:
            ConfigError: A part must be named, and was not.
        """
        return ""

    @abstractmethod
    def write(self, parts: list[Part], place: Path) -> None:
        """Write the files into an empty directory."""

    @abstractmethod
    def read(self, place: Path) -> dict[str, dict[str, Update]]:
        """Read such files: component -> module path -> update."""

    def changed_others(self, part: Part, place: Path) -> list[str]:
        """Names of tensors besides the factors that do not read back as they were, bit for bit."""
        return []

    @abstractmethod
    def usage(self, place: Path, parts: list[Part]) -> str:
        """What the user does with the files next."""

    def notes(self, source: Source) -> list[str]:
        """What the user should know, though nothing is lost."""
        return []


#: Every target by name.
targets: NameRegistry[Target] = NameRegistry("export target")


def find(name: str) -> Target:
    """The target of a name.

    Raises:
        ConfigError: There is none; names those that there are.
    """
    target = targets.get(name) if isinstance(name, str) else None
    if target is None:
        raise ConfigError(no_target(name, targets.names()))
    return target


def refuse(
    problems: Mapping[str, list[Problem]], sources: Mapping[str, Source], target: Target, directory: Path
) -> None:
    """Raise where there is a problem, with all of them and every way out.

    Args:
        problems: Component -> problems.
        sources: Component -> adapter.
        target: That cannot express them.
        directory: Of the adapter.

    Raises:
        ExportError: With the full list.
    """
    lines = [
        f"  - {f'{component}: ' if component else ''}{problem.reason}"
        for component, found in problems.items()
        for problem in found
    ]
    if not lines:
        return
    ways = [p.way for found in problems.values() for p in found if p.way]
    merge = [merging(source) for source in sources.values()]
    ways += [] if None in merge else [Text(way) for way in merge if way is not None]
    raise ExportError(
        f"{directory} cannot be exported for {target.name} ({target.reader}), which does not support:\n",
        "\n".join(lines),
        "\nWays out:\n  - " if ways else "\nIt cannot be merged either, so only PEFT and Veneer can use it",
        Text.join("\n  - ", dict.fromkeys(ways)),
    )


def plain_config(part: Part, **changes: Any) -> dict[str, Any]:
    """The adapter's own configuration after folding, in PEFT's format."""
    config, folded = part.source.config, part.folded
    config = replace(
        config,
        r=folded.r,
        lora_alpha=folded.alpha,
        use_rslora=folded.use_rslora,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        use_dora=any(u.magnitude is not None for u in folded.updates.values()),
        lora_bias=any(u.bias is not None for u in folded.updates.values()),
        **changes,
    )
    return config.to_json()
