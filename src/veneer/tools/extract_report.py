"""What an adapter that was made of two models holds, and what it misses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .measuring import in_words


@dataclass(frozen=True)
class Extracted:
    """The update of one module, or of a stack of experts.

    Attributes:
        rank: Its rank; every expert of a stack has it.
        norm: ``‖ΔW‖``, the Frobenius norm of what training changed.
        error: ``‖ΔW − BA‖ / ‖ΔW‖``, of the factors as they are stored.
    """

    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class LeftOut:
    """A tensor that training changed and that the adapter does not hold.

    Attributes:
        size: In bytes.
        norm: Norm of its change.
        reason: Why.
    """

    size: int
    norm: float
    reason: str


@dataclass(frozen=True)
class ExtractReport:
    """An adapter that was made of two models.

    Attributes:
        directory: Where it is.
        modules: Path of a module, or name of a parameter -> its update.
        whole: Tensor -> its size in bytes, of those that are saved as they are: norms in ``modules_to_save``,
            and biases.
        left_out: Tensor -> what is missing.
        unchanged: Number of tensors that are the same in both models.
        norm: Norm of everything that training changed.
        error: Norm of what the adapter misses, in units of ``norm``.
        notes: What else is to be known.
    """

    directory: Path
    modules: Mapping[str, Extracted]
    whole: Mapping[str, int]
    left_out: Mapping[str, LeftOut]
    unchanged: int
    norm: float
    error: float
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> str:
        """The module with the largest error."""
        return max(self.modules, key=lambda path: self.modules[path].error)

    def __str__(self) -> str:
        ranks = [module.rank for module in self.modules.values()]
        words = in_words(ranks, self.error, self.worst, self.modules[self.worst].error)
        return f"{words}; what is left out counts as missed" if self.left_out else words
