"""Asynchronous successive halving: which runs go on, and which are not worth it.

Configurations are compared at rungs, by the mean held-out loss of their seeds. Of those that have reached a
rung so far, the best third goes on to the next one, without waiting for the others::

    goes on   if its rank at rung k is below min(⌊n_k / 3⌋, ⌈N / 3^(k+1)⌉)
    stops     if its rank at rung k is above ⌈N / 3^(k+1)⌉

with n_k configurations at the rung and N in all; ⌈n_k / 3⌉ where nobody else is on the way to it. A rank only
gets worse when others arrive, so what is stopped could never have gone on. One more than go on is kept until
the end, in case those diverge.

Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020, arXiv:1810.05934, algorithm 2.
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
            losses = self.losses(rung)
            more = KEEP - 1 if self._all_are_at(rung) else 0  # a third is rounded up at the end
            for number in list(losses)[: min((len(losses) + more) // KEEP, self._most(rung))]:
                if math.isfinite(losses[number]) and self._is_at(number, rung):
                    return self.configurations[number]
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
                    return self.configurations[number]
        return []

    def out(self) -> list[Trial]:
        """Paused runs that will never go on."""
        found = []
        for rung in range(self.rungs - 1):
            for rank, (number, loss) in enumerate(self.losses(rung).items()):
                if self._is_at(number, rung) and (rank > self._most(rung) or not math.isfinite(loss)):
                    found += [one for one in self.configurations[number] if one.state == "paused"]
        return found

    def _most(self, rung: int) -> int:
        """How many configurations go on at a rung at most."""
        most: int = math.ceil(len(self.configurations) / KEEP ** (rung + 1))
        return most

    def _all_are_at(self, rung: int) -> bool:
        """Whether nobody is on the way to a rung."""
        every = (one for seeds in self.configurations.values() for one in seeds)
        return not any(
            one.state == "waiting" or (one.state == "training" and one.rung <= rung) for one in every
        )

    def _is_at(self, number: int, rung: int) -> bool:
        """Whether a configuration waits at a rung."""
        seeds = self.configurations[number]
        return any(one.state == "paused" for one in seeds) and all(
            one.rung == rung for one in seeds if one.state == "paused"
        )
