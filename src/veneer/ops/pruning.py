"""Combining task tensors entry by entry: trim, elect a sign, and merge the entries that agree.

Tensors of one shape, one for each task; everything is computed in their own type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.errors import CombineError

#: How entries are dropped, whether the rest is scaled up, and whether a sign is elected.
METHODS: dict[str, tuple[str, bool]] = {
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
    "magnitude_prune": ("magnitude", False),
}
SIGNS = ("total", "frequency")


@torch.no_grad()
def combine(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    method: str,
    density: float,
    majority_sign_method: str = "total",
) -> Tensor:
    """Combine several tensors into one by ties, dare_linear, dare_ties or magnitude_prune.

    Each tensor keeps a share ``density`` of its entries: the largest, or random ones scaled by
    ``1 / density``. Without a vote the result is ``Σ wᵢ tᵢ``; with one it is, entry by entry, the mean of
    ``wᵢ tᵢ`` over the tensors whose sign is the elected one.

    Args:
        tensors: Of one shape.
        weights: One factor each.
        method: A name of `METHODS`.
        density: Share of the entries that stay, in [0, 1].
        majority_sign_method: The sign of the sum of the entries (``"total"``), or that of most of them
            (``"frequency"``).

    Raises:
        CombineError: For a method, a density or a vote that does not exist.

    Source: Yadav et al., "TIES-Merging", 2023, algorithm 1; Yu et al., "Language Models are Super Mario"
        (DARE), 2023, equation 1.
    """
    if problems := refused(method, density, majority_sign_method):
        raise CombineError("; ".join(problems))
    how, vote = METHODS[method]
    kept = torch.stack([_trimmed(tensor, density, how) for tensor in tensors])
    factors = torch.tensor(list(weights), dtype=kept.dtype, device=kept.device)
    weighted = kept * factors.view(-1, *(1,) * (kept.dim() - 1))
    if not vote:
        return weighted.sum(0)
    votes = kept if majority_sign_method == "total" else kept.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agree = kept.sign() == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def refused(method: str, density: object, majority_sign_method: str) -> list[str]:
    """Reasons for which a request cannot be fulfilled, as sentences."""
    found = []
    if method not in METHODS:
        found.append(f"{method!r} is none of {', '.join(METHODS)}")
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 <= density <= 1:
        found.append(f"{method} keeps a share density of the entries, a number from 0 to 1, got {density!r}")
    if majority_sign_method not in SIGNS:
        found.append(f"majority_sign_method is 'total' or 'frequency', got {majority_sign_method!r}")
    return found


def _trimmed(tensor: Tensor, density: float, how: str) -> Tensor:
    if density == 1:
        return tensor
    if density == 0:
        return torch.zeros_like(tensor)
    if how == "random":
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    count = int(density * tensor.numel())
    flat = torch.zeros_like(tensor).flatten()
    largest = tensor.abs().flatten().topk(count).indices
    flat[largest] = tensor.flatten()[largest]
    return flat.view_as(tensor)
