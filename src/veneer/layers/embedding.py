"""Embeddings: `torch.nn.Embedding`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from veneer import backends
from veneer.errors import Text
from veneer.layers.factor import stand_in, unwrapped
from veneer.layers.layer import LoraLayer
from veneer.spec import LoraSpec


class LoraEmbedding(LoraLayer):
    """``y = W[i] + s · B A[:, i]``, with A (r, vocab) and B (dim, r).

    The factors are parameters, not modules: on disk they have no ``.weight``. Dropout does not apply:
    the input is an index. The base renormalises its own rows if it has a ``max_norm``; the update is
    not renormalised.

    Shapes: x: (...) integer -> (..., dim).
    """

    wraps = ("torch.nn.modules.sparse.Embedding",)
    factor_names = ("lora_embedding_A", "lora_embedding_B")
    transposed = True
    lookup = True
    takes_rows = False

    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        #: Layers of heads that share these factors.
        self.followers: list[LoraLayer] = []
        # What a subclass multiplies codes with (FP8) is their scale, and none of the update's.
        self._codes = backends.holds_codes(base_layer)

    def adapters_changed(self) -> None:
        """Update the branches that a forward adds, here and in the heads that share the factors."""
        super().adapters_changed()
        for follower in self.followers:
            follower.adapters_changed()

    @classmethod
    def shapes(cls, base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, vocab), B (dim, r)."""
        return (r, int(base.num_embeddings)), (int(base.embedding_dim), r)  # type: ignore[arg-type]

    @classmethod
    def refuses(cls, base: nn.Module, spec: LoraSpec) -> str | Text | None:
        return "lora_bias has no meaning for an embedding" if spec.lora_bias else None

    def new_container(self) -> nn.Module:
        return nn.ParameterDict()

    def new_factors(
        self, name: str, a: Tensor, b: Tensor, bias: Tensor | None
    ) -> tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]:
        return nn.Parameter(a), nn.Parameter(b)

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name], None

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """x: (...) integer -> (..., dim). Gradients of A are scaled like the base's, but always dense.

        A is stored as (r, vocab), and torch cannot transpose a sparse gradient.
        """
        a, b, _ = self.factors(name)
        rows, residual = self._look_up(x, a), self.residual(name)
        if residual is None:
            return rows @ b.T
        # as `folded`, but only for the needed rows instead of the whole table
        return rows @ (b - residual[1]).T + (rows - self._look_up(x, residual[0])) @ residual[1].T

    def _look_up(self, x: Tensor, a: Tensor) -> Tensor:
        base: Any = unwrapped(self.geometry())
        if type(base).forward is nn.Embedding.forward or self._codes:
            return F.embedding(
                x, a.T, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
            )
        # A subclass may scale its rows: run its forward with A in place of W.
        changes = {"embedding_dim": a.shape[0], "max_norm": None, "sparse": False}
        return type(base).forward(stand_in(base, {"weight": a.T}, changes), x)  # type: ignore[no-any-return]

    def dropout_of(self, name: str) -> float:
        """0: the input is an index."""
        return 0.0

    def dropped(self, name: str, x: Tensor) -> Tensor:
        return self.to_factors(name, x)

    def before_merge(self, weight: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """With a ``max_norm``, the rows as a lookup renormalises them."""
        base: Any = self.geometry()
        limit = base.max_norm
        if limit is None:
            return weight, {}
        if weight.is_meta:
            return weight, {"max_norm": None}
        norms = weight.norm(p=base.norm_type, dim=1, keepdim=True)
        return (weight * (limit / (norms + 1e-7)).where(norms > limit, norms.new_ones(()))).to(weight), {
            "max_norm": None
        }
