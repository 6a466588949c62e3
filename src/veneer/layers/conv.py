"""Convolutions: `torch.nn.Conv1d`, `Conv2d`, `Conv3d` and their subclasses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer import backends
from veneer.errors import Hint, Text
from veneer.layers.factor import stand_in, unwrapped
from veneer.layers.layer import LoraLayer
from veneer.spec import LoraSpec

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = {function for kind in _KINDS for function in (kind.forward, kind._conv_forward)}
_NOT_LINEAR = (
    "its class has a forward of its own that is not linear in the weight (a standardised weight?): an update "
    "added to the weight would not do what the branch does. Keep the adapter unmerged"
)


def _has_own_forward(base: Any) -> bool:
    own = type(base).forward not in _FORWARDS or type(base)._conv_forward not in _FORWARDS
    # What a subclass multiplies codes with (FP8) is their scale, and none of the update's.
    return own and not backends.holds_codes(base)


class LoraConv(LoraLayer):
    """``y = W ∗ x + b + s · B ∗₁ (A ∗ x)``: A has the base's geometry, B is a 1×1 convolution.

    As in PEFT's files, A is (r, in, k…) regardless of groups, and B is (out, r / groups, 1…). So with groups
    an update reaches across them; merging then replaces the weight by an equivalent one without groups.

    Shapes: x: (batch, in, d…) -> (batch, out, d'…).
    """

    wraps = ("torch.nn.modules.conv.Conv1d", "torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.Conv3d")

    @classmethod
    def shapes(cls, base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in, k…), B (out, r / groups, 1…)."""
        conv: Any = base
        ones = (1,) * len(conv.kernel_size)
        return (r, conv.in_channels, *conv.kernel_size), (conv.out_channels, r // conv.groups, *ones)

    @classmethod
    def refuses(cls, base: nn.Module, spec: LoraSpec) -> Text | None:
        """Refuses a rank that the groups do not divide."""
        conv: Any = base
        if spec.r % conv.groups:
            return Text(
                f"its {conv.groups} groups do not divide the rank, ",
                Hint("r", spec.r),
                "; choose a multiple (rank_pattern)",
            )
        return None

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        """Also refuses a subclass whose forward is not linear in its weight."""
        reasons = super().refuses_merge(names)
        if names and not self.is_linear():
            reasons.append(_NOT_LINEAR)
        return reasons

    @torch.no_grad()
    def is_linear(self) -> bool:
        """Whether the output doubles when the weight does, also in a subclass's forward."""
        base: Any = unwrapped(self.geometry())
        backend = backends.find(self.base_layer)
        like: dict[str, Any] = {"device": backend.device(self.base_layer), "dtype": base.weight.dtype}
        if not _has_own_forward(base) or like["device"].type == "meta":
            return True
        a = torch.linspace(-1.0, 1.0, 2 * base.in_channels * math.prod(base.kernel_size), **like)
        a = a.view(2, base.in_channels, *base.kernel_size)
        sizes = (d * (k - 1) + 8 for k, d in zip(base.kernel_size, base.dilation, strict=True))
        shape = (1, base.in_channels, *sizes)
        x = torch.linspace(-1.0, 1.0, math.prod(shape), **like).view(shape)
        once, twice = (self._convolve_as_base(base, x, n * a) for n in (1, 2))
        return torch.allclose(twice, 2 * once, rtol=1e-2, atol=1e-2 * float(once.abs().max()))

    def is_matrix(self) -> bool:
        """With groups, B is block-diagonal."""
        base: Any = self.geometry()
        return int(base.groups) == 1

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """x: (batch, in, d…) -> (batch, out, d'…)."""
        base: Any = unwrapped(self.geometry())
        pointwise = partial(_CONVOLVE[len(base.kernel_size)], groups=base.groups)
        a, b = self.operators(name)
        return b(a(x, partial(self._convolve_as_base, base)), pointwise)

    @staticmethod
    def _convolve_as_base(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``weight ∗ x`` with the base's stride, dilation and padding, without its groups and bias."""
        if _has_own_forward(base):
            # A subclass may pad differently: run its forward with A in place of W.
            changes = {"groups": 1, "out_channels": weight.shape[0]}
            twin = stand_in(base, {"weight": weight, "bias": None}, changes)
            return type(base).forward(twin, x)  # type: ignore[no-any-return]
        convolve = _CONVOLVE[len(base.kernel_size)]
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            return convolve(x, weight, None, base.stride, 0, base.dilation)
        return convolve(x, weight, None, base.stride, base.padding, base.dilation)

    def rows(self, x: Tensor) -> Tensor:
        """The patches, by filters that are one at a single position. x: (batch, in, d…) -> (n, in·k…)."""
        base: Any = unwrapped(self.geometry())
        size = base.in_channels * math.prod(base.kernel_size)
        each = torch.eye(size, dtype=x.dtype, device=x.device)
        patches = self._convolve_as_base(base, x, each.view(size, base.in_channels, *base.kernel_size))
        return patches.movedim(-1 - len(base.kernel_size), -1).reshape(-1, size)

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """B (out, r), block-diagonal over the groups, and A (r, in·k…)."""
        base: Any = self.geometry()
        b2 = b.flatten(1)
        if base.groups > 1:
            b2 = torch.block_diag(*b2.chunk(base.groups))  # type: ignore[no-untyped-call]
        return b2, a.flatten(1)

    @property
    def out_axis(self) -> int:
        base: Any = self.geometry()
        return -len(base.kernel_size) - 1

    def vector_shape(self) -> tuple[int, ...]:
        """(1, out, 1…)."""
        base: Any = self.geometry()
        return (1, base.out_channels, *(1,) * len(base.kernel_size))

    def before_merge(self, weight: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """With groups, the equivalent weight without them: (out, in, k…), zero across groups."""
        base: Any = self.geometry()
        groups = base.groups
        if groups == 1:
            return weight, {}
        out, width = weight.shape[:2]
        if weight.is_meta:
            return weight.new_empty(out, width * groups, *weight.shape[2:]), {"groups": 1}
        full = weight.new_zeros(out, width * groups, *weight.shape[2:])
        rows = out // groups
        for g in range(groups):
            block = slice(g * rows, (g + 1) * rows)
            full[block, g * width : (g + 1) * width] = weight[block]
        return full, {"groups": 1}
