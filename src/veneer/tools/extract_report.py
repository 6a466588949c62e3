"""What an adapter that was made of two models holds, and what it misses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .measuring import SizeReport


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


@dataclass(frozen=True, kw_only=True)
class ExtractReport(SizeReport):
    """An adapter that was made of two models.

    Attributes:
        modules: Path of a module, or name of a parameter -> its update.
        whole: Tensor -> its size in bytes, of those that are saved as they are: norms in ``modules_to_save``,
            and biases.
        left_out: Tensor -> what is missing.
        unchanged: Number of tensors that are the same in both models.
        norm: Norm of everything that training changed.
        error: Norm of what the adapter misses, in units of ``norm``.
    """

    modules: Mapping[str, Extracted]
    whole: Mapping[str, int]
    left_out: Mapping[str, LeftOut]
    unchanged: int

    def __str__(self) -> str:
        words = super().__str__()
        return f"{words}; what is left out counts as missed" if self.left_out else words
