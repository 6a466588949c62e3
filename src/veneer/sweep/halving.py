"""Successive halving: which runs go on, and which are not worth it.

Configurations are compared at rungs, by the mean held-out loss of their seeds. Of N configurations, the best
⌈N / 3^(k+1)⌉ at rung k go on to the next one::

    goes on   if fewer than ⌈N / 3^(k+1)⌉ are better, counting those that have not come to the rung
    stops     if more than ⌈N / 3^(k+1)⌉ of those that have come to it are better

So nobody waits for what is decided already, and what is decided does not depend on the order in which runs
come. One more than go on is kept until the end, in case those diverge.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification, 2016, arXiv:1502.07943, algorithm 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from .trial import KEEP, Trial


class Halving:
    """Decides which configurations go on.

    Args:
        trials: All runs; what they are and how far is read anew at each call.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.configurations: dict[int, list[Trial]] = {}
        for trial in trials:
            self.configurations.setdefault(trial.configuration, []).append(trial)
        self.rungs = len(trials[0].rungs)
        # The first that are compared should be any of the grid, and not all of its lowest values.
        self.order = random.Random(0).sample(list(self.configurations), len(self.configurations))

    def losses(self, rung: int) -> dict[int, float]:
        """Mean loss of the configurations that have reached a rung with all seeds, the best first."""
        found = {}
        for number, seeds in self.configurations.items():
            if all(len(one.evaluations) > rung for one in seeds):
                found[number] = sum(one.evaluations[rung] for one in seeds) / len(seeds)
            elif all(len(one.evaluations) > rung or one.state == "diverged" for one in seeds):
                found[number] = math.inf
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def next(self) -> list[Trial]:
        """The runs of the configuration that is to be trained to its next rung, or none.

        Whoever takes them begins with them before asking again.
        """
        for rung in reversed(range(self.rungs - 1)):
            for number in self._best(rung, self._most(rung) - self._missing(rung)):
                if self._is_at(number, rung):
                    return self._paused(number)
        for number in self.order:
            if all(one.state == "waiting" for one in self.configurations[number]):
                return self.configurations[number]
        return self._spare()

    def _spare(self) -> list[Trial]:
        """The best that is left, where nobody trains and nobody has come to the end."""
        training = any(one.state == "training" for seeds in self.configurations.values() for one in seeds)
        if training or any(map(math.isfinite, self.losses(self.rungs - 1).values())):
            return []
        for rung in reversed(range(self.rungs - 1)):
            for number, loss in self.losses(rung).items():
                if math.isfinite(loss) and self._is_at(number, rung):
                    return self._paused(number)
        return []

    def out(self) -> list[Trial]:
        """Paused runs that will never go on."""
        found = []
        for rung in range(self.rungs - 1):
            for rank, (number, loss) in enumerate(self.losses(rung).items()):
                if self._is_at(number, rung) and (rank > self._most(rung) or not math.isfinite(loss)):
                    found += self._paused(number)
        return found

    def _most(self, rung: int) -> int:
        """How many configurations go on at a rung at most."""
        most: int = math.ceil(len(self.configurations) / KEEP ** (rung + 1))
        return most

    def _best(self, rung: int, count: int) -> list[int]:
        """The best of those at a rung, without what diverged."""
        losses = self.losses(rung)
        return [number for number in list(losses)[: max(count, 0)] if math.isfinite(losses[number])]

    def _missing(self, rung: int) -> int:
        """How many configurations may still come to a rung."""
        there = self.losses(rung)
        if rung == 0:
            return len(self.configurations) - len(there)
        if self._missing(rung - 1) == 0:
            return sum(number not in there for number in self._best(rung - 1, self._most(rung - 1)))
        came = sum(any(one.rung >= rung for one in self.configurations[number]) for number in there)
        return self._most(rung - 1) - came

    def _paused(self, number: int) -> list[Trial]:
        return [one for one in self.configurations[number] if one.state == "paused"]

    def _is_at(self, number: int, rung: int) -> bool:
        """Whether a configuration waits at a rung."""
        paused = self._paused(number)
        return bool(paused) and all(one.rung == rung for one in paused)
