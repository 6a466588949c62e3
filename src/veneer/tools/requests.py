"""What can be asked of the tools, checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
    if energy is not None and (isinstance(energy, bool) or not 0 < energy <= 1):
        wrong.append(Text(Hint("energy"), f" must be a share above 0 and up to 1, got {energy!r}"))
    if wrong:
        raise ConfigError(Text.join("; ", wrong))


def check_place(output: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Check that an adapter can be written; the adapters that it is made of are never written to.

    Raises:
        VeneerError: The directory is one of the sources, holds files, or cannot be written.
    """
    if any(output.resolve() == source.resolve() for source in sources):
        raise VeneerError(f"{output} contains the adapter itself; choose another output directory")
    check_replaceable(output, overwrite, "adapter")
