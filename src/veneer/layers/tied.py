"""Layers that share an embedding's weight and its factors: a head, or another embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import Hint, TargetError, Text
from veneer.inits import find
from veneer.layers.embedding import LoraEmbedding
from veneer.layers.factor import Mirror, Shared, SharedFactors, stand_in
from veneer.layers.layer import LoraLayer, Prepared
from veneer.layers.linear import LoraLinear
from veneer.sharded import is_distributed
from veneer.spec import LoraSpec


class LoraFollower(LoraLayer):
    """A layer that holds nothing of its own: one tensor, one gradient and one merge, which the leader does.

    Args:
        base_layer: The module, whose weight is the embedding's.
        leader: The embedding's layer.
    """

    def __init__(self, base_layer: nn.Module, leader: LoraEmbedding) -> None:
        super().__init__(base_layer)
        # In a list: a module as an attribute would be registered, and saved twice.
        self._tied_to = [leader]

    @property
    def tied_adapter(self) -> LoraEmbedding:
        return self._tied_to[0]

    @classmethod
    def refuses(cls, base: nn.Module, spec: LoraSpec) -> str | Text | None:
        """Refuses what a shared weight and shared factors cannot do for both."""
        if spec.variant != "plain":
            return f"{spec.variant} changes an embedding and a head differently, and their weight is one"
        init = find(spec.init)
        if init.replaces_base or init.subtracts_start:
            return Text(
                Hint("init_lora_weights", spec.init), " gives the embedding another start than the head"
            )
        return super().refuses(base, spec)

    # -- what it holds: nothing of its own -------------------------------------------------------------

    def put_adapter(self, adapter: Prepared) -> None:
        """Store an adapter, and follow changes of the embedding's from now on."""
        super().put_adapter(adapter)
        if self not in self.tied_adapter.followers:
            self.tied_adapter.followers.append(self)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        return iter(())

    def move_adapter(self, old: str, new: str) -> None:
        super().move_adapter(old, new)
        for key in self.factor_names:
            container: Any = self._modules[key]
            container[new].name = new

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As for any such layer, with the embedding's factors.

        Raises:
            TargetError: FSDP has sharded them, because the embedding is a separate unit.
        """
        if self._live and not torch.compiler.is_compiling() and not self.disable_adapters:
            factor = self.tied_adapter.factors(self._live[0])[0]
            if factor.dim() < 2 or is_distributed(factor):
                raise TargetError(
                    "the factors of the embedding, which its head shares, are sharded while the head "
                    "computes: put both into one unit of FSDP (leave them to the root, or "
                    "fully_shard([embedding, head]))"
                )
        return super().forward(x, *args, **kwargs)

    # -- merging: the embedding's ------------------------------------------------------------------------

    def adapters_changed(self) -> None:
        """What is merged into the embedding's weight is merged here."""
        self._merged = [name for name in self.tied_adapter.merged_adapters if name in self._specs]
        super().adapters_changed()

    def original_base(self) -> nn.Module:
        if not self._merged:
            return self.get_base_layer()
        return stand_in(self.base_layer, {"weight": self.tied_adapter.original_base().weight})  # type: ignore[dict-item]


class LoraTiedHead(LoraFollower, LoraLinear):
    """``y = x Wᵀ + b + s · dropout(x) B Aᵀᵀ``: a head with the embedding's weight and factors.

    The embedding's update of ``W`` (vocab, dim) is ``s·(BA)ᵀ``, with A (r, vocab) and B (dim, r). The head's
    is the same: its own names A (r, dim) and B (vocab, r) stand for ``Bᵀ`` and ``Aᵀ``.

    Shapes: x: (..., dim) -> (..., vocab).
    """

    @classmethod
    def refuses(cls, base: nn.Module, spec: LoraSpec) -> str | Text | None:
        """Refuses a forward that does more with the weight than multiply."""
        if type(base).forward is not nn.Linear.forward:
            return "the head has a forward of its own"
        return super().refuses(base, spec)

    def new_factors(
        self, name: str, a: Tensor, b: Tensor, bias: Tensor | None
    ) -> tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]:
        """The embedding's factors; the arguments are ignored."""
        leader = self.tied_adapter
        return Mirror(leader.lora_embedding_B, name), Mirror(leader.lora_embedding_A, name)


class LoraTiedEmbedding(LoraFollower, LoraEmbedding):
    """An embedding with the weight and factors of another one, as in encoder-decoder models.

    Each scales its rows as its own forward does.

    Shapes: x: (...) integer -> (..., dim).
    """

    def new_container(self) -> nn.Module:
        return SharedFactors()

    def new_factors(
        self, name: str, a: Tensor, b: Tensor, bias: Tensor | None
    ) -> tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]:
        leader = self.tied_adapter
        return Shared(leader.lora_embedding_A, name), Shared(leader.lora_embedding_B, name)

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.tied_adapter.factors(name)
