"""What merging kept of the update, after rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.wording import warn

#: Below this share of the update that survives rounding, a merge warns.
KEPT_WARNING = 0.8


@dataclass(frozen=True)
class MergeReport:
    """What merging kept of the update, after rounding to the type of the base weight.

    Attributes:
        kept: Share of the update kept, ``1 − ‖error‖ / ‖update‖``, by module path. It is in [0, 1] for
            floating-point weights; quantising a weight again may change it by more than the update does, and
            the share is then below 0. It is NaN where the merged weight is not finite.
        requantised: Paths of the modules whose weight was quantised again.
    """

    kept: Mapping[str, float]
    requantised: tuple[str, ...] = ()

    @property
    def undefined(self) -> list[str]:
        """Paths of the modules whose merged weight is not finite, so that nothing can be said of it."""
        return [path for path, share in self.kept.items() if math.isnan(share)]

    @property
    def error(self) -> Mapping[str, float]:
        """Norm of the error of each merged weight, in units of the norm of its update."""
        return {path: 1.0 - share for path, share in self.kept.items()}

    @property
    def worst(self) -> float:
        """The smallest share of a module; NaN where one is."""
        return math.nan if self.undefined else min(self.kept.values(), default=1.0)

    @property
    def mean(self) -> float:
        """The mean share over the modules."""
        return sum(self.kept.values()) / len(self.kept) if self.kept else 1.0

    def __str__(self) -> str:
        if lost := self.undefined:
            return (
                f"merged {len(self.kept)} modules; {len(lost)} of them hold NaN or infinity now, for example "
                f"{lost[0]}"
            )
        text = (
            f"merged {len(self.kept)} modules; {self.mean:.1%} of the update kept (least: {self.worst:.1%})"
        )
        if not self.requantised:
            return text
        error = sum(self.error[path] for path in self.requantised) / len(self.requantised)
        return f"{text}; {len(self.requantised)} quantised again, with an error of {error:.1%} of the update"


def mention_lost(report: MergeReport) -> None:
    """Warn of what merging lost."""
    if lost := report.undefined:
        warn(
            f"the merged weights of {', '.join(lost[:3])} hold NaN or infinity, as the base's do"
            + (f"; so do those of {len(lost) - 3} more" if len(lost) > 3 else "")
        )
    elif report.mean < KEPT_WARNING:
        worst = min(report.kept, key=lambda p: report.kept[p])
        way_out = (
            "Merge into ordinary weights (merge_and_unload(dequantize=True))"
            if report.requantised
            else "Merge into float32"
        )
        warn(
            f"only {report.mean:.0%} of the update survives rounding to the base weights' type (least in "
            f"{worst}: {report.worst:.0%}): merged and unmerged outputs will differ. {way_out}, or keep "
            "the adapter unmerged"
        )
