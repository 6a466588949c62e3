"""What can be asked of the tools, checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.values import is_number
from ..errors import ConfigError, Hint, Text, VeneerError
from ..files.overwrite import check_replaceable


def check_size(rank: int | None, energy: float | None, *, needed: bool = True) -> None:
    """Check the size that an adapter is to have.

    Args:
        rank: The rank of every module at most.
        energy: The share of each update's energy that it keeps at least.
        needed: Whether one of them has to be given.

    Raises:
        ConfigError: They cannot be right; lists everything.
    """
    wrong = []
    if rank is not None and energy is not None:
        wrong.append(Text("give either ", Hint("rank"), " or ", Hint("energy"), ", not both"))
    if rank is None and energy is None and needed:
        wrong.append(Text("give ", Hint("rank"), ", or ", Hint("energy"), " to let each module have its own"))
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        wrong.append(Text(Hint("rank"), f" must be a whole number above 0, got {rank!r}"))
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        wrong.append(Text(Hint("energy"), f" must be a share above 0 and up to 1, got {energy!r}"))
    if wrong:
        raise ConfigError(Text.join("; ", wrong))


def check_place(output: Path, sources: Sequence[Path], overwrite: bool, what: str = "adapter") -> None:
    """Check that an adapter can be written; the adapters or models that it is made of are never written to.

    Raises:
        VeneerError: The directory is one of the sources, holds files, or cannot be written.
    """
    if any(output.resolve() == source.resolve() for source in sources):
        raise VeneerError(f"{output} contains the {what} itself; choose another output directory")
    check_replaceable(output, overwrite, "adapter")


#: What `LoraModel.add_weighted_adapter` can do.
TRIMMING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("linear", "cat", "svd", *TRIMMING, *(f"{name}_svd" for name in TRIMMING))


@dataclass(frozen=True)
class Request:
    """What is asked of `combine_adapters`."""

    weights: tuple[float, ...]
    combination_type: str
    rank: int | None
    energy: float | None
    density: float | None
    majority_sign_method: str

    @classmethod
    def of(
        cls,
        adapters: int,
        weights: Sequence[float] | None,
        combination_type: str,
        rank: int | None,
        energy: float | None,
        density: float | None,
        majority_sign_method: str,
    ) -> Request:
        """The request, checked; a rank makes "svd" of "cat".

        Raises:
            ConfigError: It cannot be right; lists everything.
        """
        wrong: list[str | Text] = []
        if adapters < 1:
            wrong.append("no adapter was named")
        numbers = [1.0] * adapters if weights is None else list(weights)
        if len(numbers) != adapters:
            wrong.append(
                Text(Hint("weights"), f" takes a number for each adapter: {adapters}, not {len(numbers)}")
            )
        if not all(map(is_number, numbers)):
            wrong.append(Text(Hint("weights"), f" must be finite numbers, got {numbers}"))
        method = combination_type.removesuffix("_svd")
        hint = Hint("combination_type")
        if combination_type not in METHODS:
            wrong.append(Text(hint, f" is one of {', '.join(METHODS)}, not {combination_type!r}"))
        elif method in TRIMMING:
            if not (is_number(density) and 0 <= density <= 1):
                given = "" if density is None else f", got {density!r}"
                wrong.append(Text(f"{method} needs ", Hint("density"), f", a share from 0 to 1{given}"))
            if method == combination_type and (rank is not None or energy is not None):
                wrong.append(
                    Text(
                        f"{method} works on factors of one rank; to cut, use ",
                        Hint("combination_type", f"{method}_svd"),
                    )
                )
        elif density is not None:
            wrong.append(Text(Hint("density"), f" belongs to {', '.join(TRIMMING)}"))
        if majority_sign_method not in ("total", "frequency"):
            wrong.append(
                Text(Hint("majority_sign_method"), f" is total or frequency, not {majority_sign_method!r}")
            )
        try:
            check_size(rank, energy, needed=False)
        except ConfigError as error:
            wrong.append(error.message)
        if wrong:
            raise ConfigError(Text.join("; ", wrong))
        cuts = rank is not None or energy is not None
        kind = "svd" if cuts and combination_type in ("linear", "cat") else combination_type
        return cls(tuple(map(float, numbers)), kind, rank, energy, density, majority_sign_method)

    @property
    def method(self) -> str:
        """How entries are combined."""
        return self.combination_type.removesuffix("_svd")

    @property
    def trims(self) -> bool:
        """Whether entries are trimmed."""
        return self.method in TRIMMING

    @property
    def cuts(self) -> bool:
        """Whether a decomposition is cut to a rank."""
        return self.combination_type.endswith("svd")
