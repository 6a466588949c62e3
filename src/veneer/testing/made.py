"""What a law is checked on: one base layer, adapted in one way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer import inits, variants
from veneer.config import LoraConfig
from veneer.layers import LoraLayer, wrap
from veneer.spec import variant_name
from veneer.testing.tolerances import Tolerance


@dataclass(frozen=True, eq=False)
class LayerCase:
    """A base layer, an input for it, and options of the adapter besides the defaults.

    Args:
        name: Its name.
        base: Makes the layer.
        x: Makes an input.
        options: Of the configuration.
        renormalises: The base's own forward writes its weight (max_norm).
        unmergeable: A merge is refused, for a reason that contains this.
    """

    name: str
    base: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    renormalises: bool = False
    unmergeable: str = ""


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True)
class Made:
    """One layer case, adapted and stored in one way, in one dtype.

    Args:
        case: The layer case.
        asked: Options of the configuration that ask for the initialisation and the variant.
        store: Brings a dense module into the storage of a backend.
        dtype: Of the base.
    """

    case: LayerCase
    asked: Mapping[str, Any] = field(default_factory=dict)
    store: Callable[[nn.Module], nn.Module] = _as_it_is
    dtype: torch.dtype = torch.float32

    def config(self, **more: Any) -> LoraConfig:
        """The configuration. ``lora_alpha`` is never ``r``: a scaling of 1 would hide a forgotten scaling."""
        options = {"r": 4, **self.case.options, **self.asked, **more}
        return LoraConfig(lora_alpha=3 * options["r"] / 2, **options)

    @property
    def unmergeable(self) -> str:
        """Part of the reason why a merge is refused; empty if it is not."""
        return self.case.unmergeable

    @property
    def quantised(self) -> bool:
        return False

    @property
    def stored(self) -> Tolerance | None:
        """How far a base in that storage may differ from a dense one; None: by rounding in its dtype."""
        return None

    @property
    def requantised(self) -> Tolerance | None:
        """Share of an output's norm that quantising a merged weight again may cost, if it is done."""
        return None

    @property
    def start(self) -> inits.Init:
        init = self.config().init_lora_weights
        return inits.find(init if isinstance(init, bool) else init.lower())

    @property
    def kind(self) -> variants.Variant:
        return variants.get(variant_name(self.config()))

    @property
    def is_dense(self) -> bool:
        return not self.quantised and not any(p.is_meta for p in self.base().parameters())

    def dense(self) -> nn.Module:
        """The base as an ordinary module, frozen; the same values each time."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            base = self.case.base().to(self.dtype).requires_grad_(False)
            for parameter in base.parameters():
                parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
        return base

    def base(self) -> nn.Module:
        return self.store(self.dense())

    def layer(self, *, trained: bool = True, **more: Any) -> LoraLayer:
        """The adapted layer, in evaluation; with factors as training might leave them."""
        layer: LoraLayer = wrap(self.base(), self.config(**more)).eval()
        if trained:
            train(layer, "default")
        return layer

    def x(self) -> Tensor:
        """An input; the same values each time."""
        with torch.random.fork_rng():
            torch.manual_seed(2)
            x = self.case.x()
        return x.to(self.dtype) if x.is_floating_point() else x


@torch.no_grad()
def train(layer: nn.Module, adapter: str, seed: int = 3) -> None:
    """Give all factors of an adapter values as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    for module in layer.modules():
        if isinstance(module, LoraLayer) and adapter in module.held_adapters:
            for parameter in module.adapter_parameters(adapter):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
