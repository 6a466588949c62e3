"""What the laws are checked on: one table for each registry, keyed by what is registered.

`test_tables.py` fails for a registered layer, initialisation, variant or backend that has no entry here, so
a new file is tested the moment it exists. The layer cases are those that break other libraries.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.pairwise import pairwise
from tests.storages import QUANTISED, UNMERGEABLE, backends
from tests.tolerances import REQUANTISED, STORED, Tolerance
from veneer import VeneerWarning
from veneer.config import LoraGAConfig
from veneer.errors import ConfigError
from veneer.inits.base import inits, note_statistics
from veneer.inits.corda import context_directions
from veneer.layers import LoraLayer, find, registry
from veneer.layers.making import why_not
from veneer.routing import Routing, routed
from veneer.spec import resolve
from veneer.testing.made import LayerCase, Made
from veneer.testing.made import train as train
from veneer.variants import registry as variants
from veneer.variants.alora import Activation


def acting_everywhere() -> AbstractContextManager[Routing]:
    """Let invoked adapters act on all of the input of layers that are called by themselves."""
    return routed(nn.Identity(), (), activation=Activation({}))


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SamePadConv2d(nn.Conv2d):
    """Like EfficientNet's: another constructor, and a forward that pads by itself as TensorFlow does."""

    def __init__(self, channels: tuple[int, int], size: int, step: int = 1, image_size: int = 9) -> None:
        super().__init__(*channels, size, stride=step, bias=False)
        total = max((-(-image_size // step) - 1) * step + size - image_size, 0)
        self.pad = nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Pad unevenly, then convolve."""
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PrePadConv2d(nn.Conv2d):
    """A subclass that changes the inner step of a convolution only."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 0, 2, 1)), weight, bias)


class StandardisedConv2d(nn.Conv2d):
    """A subclass that does not compute with its weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Every filter with unit norm."""
        norm = self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return self._conv_forward(x, self.weight / norm, self.bias)


class ScaledLinear(nn.Linear):
    """A subclass whose forward is not ``x Wᵀ + b``."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the ordinary output."""
        return 2.0 * super().forward(x)


class NamedLinear(nn.Linear):
    """A subclass with another constructor that computes the same."""

    def __init__(self, size_in: int, size_out: int, *, name: str) -> None:
        super().__init__(size_in, size_out)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """The ordinary output."""
        return F.linear(x, self.weight, self.bias)


class ScaledEmbedding(nn.Embedding):
    """Like Gemma's: the rows that are looked up are scaled."""

    def __init__(self, count: int, size: int, *, scale: float) -> None:
        super().__init__(count, size, padding_idx=0)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled rows."""
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


def _ints(*shape: int, high: int = 11) -> Callable[[], Tensor]:
    return partial(torch.randint, 0, high, shape)


def _floats(*shape: int) -> Callable[[], Tensor]:
    return partial(torch.randn, *shape)


def _transposed(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape).transpose(0, -2)


def _channels_last(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape).to(memory_format=torch.channels_last)


def _conv_cases(kind: type[nn.Module], dims: int) -> tuple[LayerCase, ...]:
    x = _floats(2, 4, *(9, 7, 5)[:dims])
    make = partial(partial, kind, 4, 6)
    return (
        LayerCase("plain", make(3), x),
        LayerCase("no-bias-pointwise", make(1, bias=False), x),
        LayerCase("stride-padding", make(3, stride=2, padding=1), x),
        LayerCase("dilation", make(2, dilation=2), x),
        LayerCase("same", make(3, padding="same", dilation=2), x),
        LayerCase("valid", make(3, padding="valid"), x),
        LayerCase("groups", make(3, groups=2, padding=1), x),
        LayerCase("groups-same-circular", make(3, groups=2, padding="same", padding_mode="circular"), x),
        LayerCase("circular", make(3, padding=1, padding_mode="circular", stride=2), x),
        LayerCase("reflect", make(3, padding=1, padding_mode="reflect"), x),
        LayerCase("replicate", make(3, padding=2, padding_mode="replicate", dilation=2), x),
        LayerCase("lora-bias", make(3), x, {"lora_bias": True}),
        LayerCase("large-rank", make(2), x, {"r": 40}),
        LayerCase("unbatched", make(3), _floats(4, *(9, 7, 5)[:dims])),
        LayerCase("empty", make(3), _floats(0, 4, *(9, 7, 5)[:dims])),
    )


LAYERS: dict[str, tuple[LayerCase, ...]] = {
    "torch.nn.modules.linear.Linear": (
        LayerCase("plain", partial(nn.Linear, 12, 10), _floats(3, 12)),
        LayerCase("no-bias", partial(nn.Linear, 12, 10, bias=False), _floats(3, 12)),
        LayerCase("1-D", partial(nn.Linear, 12, 10), _floats(12)),
        LayerCase("3-D", partial(nn.Linear, 12, 10), _floats(2, 3, 12)),
        LayerCase("4-D", partial(nn.Linear, 12, 10), _floats(2, 1, 3, 12)),
        LayerCase("non-contiguous", partial(nn.Linear, 12, 10), _transposed(3, 4, 12)),
        LayerCase("empty", partial(nn.Linear, 12, 10), _floats(0, 12)),
        LayerCase("large-rank", partial(nn.Linear, 3, 2), _floats(5, 3), {"r": 32}),
        LayerCase("lora-bias", partial(nn.Linear, 12, 10), _floats(3, 12), {"lora_bias": True}),
        LayerCase("rslora", partial(nn.Linear, 12, 10), _floats(3, 12), {"use_rslora": True}),
        LayerCase("subclass", partial(NamedLinear, 12, 10, name="q"), _floats(3, 12)),
        LayerCase(
            "subclass-no-product",
            partial(ScaledLinear, 12, 10),
            _floats(3, 12),
            unmergeable="forward of its own",
        ),
        LayerCase(
            "lora-bias-without-place",
            partial(nn.Linear, 12, 10, bias=False),
            _floats(3, 12),
            {"lora_bias": True},
            unmergeable="no place to go",
        ),
    ),
    "transformers.pytorch_utils.Conv1D": (
        LayerCase("plain", partial(Conv1D, 10, 12), _floats(3, 12)),
        LayerCase("3-D", partial(Conv1D, 10, 12), _floats(2, 3, 12)),
        LayerCase("non-contiguous", partial(Conv1D, 10, 12), lambda: torch.randn(3, 24)[:, ::2]),
        LayerCase("empty", partial(Conv1D, 10, 12), _floats(0, 12)),
        LayerCase("large-rank", partial(Conv1D, 2, 3), _floats(5, 3), {"r": 32}),
        LayerCase("lora-bias", partial(Conv1D, 10, 12), _floats(3, 12), {"lora_bias": True}),
    ),
    "torch.nn.modules.sparse.Embedding": (
        LayerCase("plain", partial(nn.Embedding, 11, 8), _ints(3, 5)),
        LayerCase("1-D", partial(nn.Embedding, 11, 8), _ints(5)),
        LayerCase("0-D", partial(nn.Embedding, 11, 8), _ints()),
        LayerCase("empty", partial(nn.Embedding, 11, 8), _ints(0, 3)),
        LayerCase("padding", partial(nn.Embedding, 11, 8, padding_idx=1), _ints(4, 5)),
        LayerCase("max-norm", partial(nn.Embedding, 11, 8, max_norm=1.5), _ints(3, 5), renormalises=True),
        LayerCase("by-frequency", partial(nn.Embedding, 11, 8, scale_grad_by_freq=True), _ints(4, 5)),
        LayerCase("sparse", partial(nn.Embedding, 11, 8, sparse=True), _ints(4, 5)),
        LayerCase("scaled", partial(ScaledEmbedding, 11, 8, scale=3.0), _ints(4, 5)),
        LayerCase("large-rank", partial(nn.Embedding, 11, 3), _ints(4), {"r": 32, "use_rslora": True}),
    ),
    "torch.nn.modules.conv.Conv1d": _conv_cases(nn.Conv1d, 1),
    "torch.nn.modules.conv.Conv2d": (
        *_conv_cases(nn.Conv2d, 2),
        LayerCase("own-constructor", partial(SamePadConv2d, (4, 6), 3, step=2), _floats(2, 4, 9, 9)),
        LayerCase("own-inner-step", partial(PrePadConv2d, 4, 6, 3, groups=2), _floats(2, 4, 9, 7)),
        LayerCase(
            "not-linear-in-its-weight",
            partial(StandardisedConv2d, 4, 6, 3),
            _floats(2, 4, 9, 7),
            unmergeable="not linear in the weight",
        ),
        LayerCase("channels-last", partial(nn.Conv2d, 4, 6, (3, 1)), _channels_last(2, 4, 7, 9)),
    ),
    "torch.nn.modules.conv.Conv3d": _conv_cases(nn.Conv3d, 3),
}

#: Types whose laws are tried in a model, by the cases of test_special_layers.py that hold one.
IN_MODELS: dict[str, str] = {"torch.nn.modules.activation.MultiheadAttention": "attention"}

#: Options that ask for each initialisation, by the name of its class.
INITS: dict[str, dict[str, Any]] = {
    "Default": {"init_lora_weights": True},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "Arbitrary": {"init_lora_weights": False},
    "Pissa": {"init_lora_weights": "pissa"},
    "OLora": {"init_lora_weights": "olora"},
    "Corda": {"init_lora_weights": "corda"},
    "LoraGA": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "Orthogonal": {"init_lora_weights": "orthogonal"},
    "Mica": {"init_lora_weights": "mica"},
    "Eva": {"init_lora_weights": "eva"},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 2}},
}


def _covariance(layer: LoraLayer, r: int) -> Any:
    weight = layer.to_matrix(getattr(layer.base_layer, layer.weight_name))
    spread = torch.randn(weight.shape[1], weight.shape[1], generator=torch.Generator().manual_seed(4))
    return context_directions(weight, spread @ spread.T, r, "ipm")


def _gradient(layer: LoraLayer, r: int) -> Any:
    shape = layer.to_matrix(getattr(layer.base_layer, layer.weight_name)).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


#: What is measured before initialisations that start from data.
STATISTICS: dict[str, Callable[[LoraLayer, int], Any]] = {"Corda": _covariance, "LoraGA": _gradient}

#: Options that ask for each variant.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [1, 2]},
}

#: How a module comes to be stored in each way.
BACKENDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dense": lambda module: module,
    "offloaded": lambda module: cpu_offload(module, execution_device="cpu"),
    **QUANTISED,
}
#: Storages as codes, of linears; the numbers of dimensions of the inputs that they can compute with.
CODED: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(QUANTISED, (1, 2, 3, 4)),
    "bitsandbytes-8bit": (2, 3),
}


class Combination(Made):
    """One layer case under one initialisation, variant, backend and dtype."""

    def __init__(self, case: LayerCase, init: str, variant: str, backend: str, dtype: torch.dtype) -> None:
        super().__init__(case, {**INITS[init], **VARIANTS[variant]}, BACKENDS[backend], dtype)
        for name, value in {"init": init, "variant": variant, "backend": backend}.items():
            object.__setattr__(self, name, value)

    init: str
    variant: str
    backend: str

    @property
    def chosen(self) -> tuple[str, str, str, torch.dtype]:
        """Initialisation, variant, backend and dtype."""
        return self.init, self.variant, self.backend, self.dtype

    @property
    def unmergeable(self) -> str:
        """Part of the reason for which a merge is refused; empty where it is not."""
        of_variant = "no weight does that" if self.variant == "alora" else ""
        return self.case.unmergeable or UNMERGEABLE.get(self.backend, "") or of_variant

    @property
    def quantised(self) -> bool:
        """Whether the base's weight is stored as codes."""
        return self.backend in CODED

    @property
    def stored(self) -> Tolerance | None:
        """How far a base in that storage lies from a dense one."""
        return STORED.get(self.backend)

    @property
    def requantised(self) -> Tolerance | None:
        """What quantising a merged weight again costs."""
        return REQUANTISED.get(self.backend)

    def base(self) -> nn.Module:
        """The base in the storage of the backend, with what its initialisation needs to know."""
        base = super().base()
        cls = find(base)
        assert cls is not None
        self.measure(cls(base), self.config().r)
        return base

    def measure(self, layer: LoraLayer, r: int) -> None:
        """Note what an initialisation that starts from data needs to know of a layer's base."""
        if self.init in STATISTICS:
            note_statistics(layer.base_layer, STATISTICS[self.init](layer, r))


def init_of(name: str) -> Any:
    """The registered initialisation whose class has that name."""
    return next(init for init in inits() if type(init).__name__ == name)


@cache
def _computes(type_name: str, case: LayerCase, dtype: torch.dtype) -> bool:
    """Whether torch has the base layer's kernels for a dtype on this machine, forward and backward."""
    base = case.base().to(dtype)
    x = case.x()
    x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
    try:
        base(x).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented" not in str(error) and "not supported" not in str(error):
            raise
        return False
    return True


SOME_DTYPES = (torch.float32, torch.bfloat16)
#: Cases that show an initialisation or a storage as much as all of them would.
TELLING = ("plain", "large-rank", "groups", "lora-bias")


def _is_worth_trying(
    first: bool, case: str, init: str, variant: str, backend: str, dtype: torch.dtype
) -> bool:
    """Every case and dtype with the default init in dense storage; each other init and storage in fewer.

    `test_every_combination.py` tries all of their combinations with each other, by fewer laws.

    Args:
        first: Whether it is the first of the layer type's cases.
        case: Its name.
    """
    if (init, variant, backend) == ("Default", "plain", "dense"):
        return True
    single = dtype == torch.float32
    if (init, backend) == ("Default", "dense"):
        return single or first
    if variant != "plain":
        return first and init == "Default" and dtype in SOME_DTYPES
    if backend == "dense":
        return single and case in TELLING
    return init == "Default" and (single or (first and dtype in SOME_DTYPES))


@cache
def _has_codes(backend: str, case: LayerCase) -> bool:
    """Whether there is such a storage of the case's base, and its library computes with the case's input."""
    # Delegation is one code for all of them: few cases show it.
    wanted = ("plain",) if backend in UNMERGEABLE else ("plain", "3-D", "empty", "lora-bias")
    return case.name in wanted and type(case.base()) is nn.Linear and case.x().dim() in CODED[backend]


def combinations() -> Iterator[tuple[str, Combination]]:
    """All that is worth trying, each with its name."""
    names = ([type(i).__name__ for i in inits()], variants.names(), [b.name for b in backends()])
    kinds = list(itertools.product(*names, DTYPES))
    for type_name, _ in registry.items():
        for number, case in enumerate(LAYERS.get(type_name, ())):
            for init, variant, backend, dtype in kinds:
                if not _is_worth_trying(number == 0, case.name, init, variant, backend, dtype):
                    continue
                if not (init in INITS and variant in VARIANTS and backend in BACKENDS):
                    continue  # test_tables.py fails for these
                if backend in CODED and not _has_codes(backend, case):
                    continue
                made = Combination(case, init, variant, backend, dtype)
                if _computes(type_name, case, dtype) and _served(made):
                    name = f"{type_name.rpartition('.')[2]}-{case.name}-{init}-{variant}-{backend}-{dtype}"
                    yield name.replace("torch.", ""), made


@cache
def _layer_without_adapter(case: LayerCase, backend: str) -> LoraLayer:
    base = BACKENDS[backend](case.base()) if backend in CODED else case.base()
    cls = find(base)
    assert cls is not None
    return cls(base)


def _served(made: Combination) -> bool:
    try:
        spec = resolve(made.config(), "default", "")
    except ConfigError:  # options that exclude one another; tests/unit/test_config.py has them
        return False
    return why_not(_layer_without_adapter(made.case, made.backend), spec) is None


def parameters() -> list[Any]:
    """All combinations as parameters for tests; those beyond a pairwise cover are slow."""
    named = dict(combinations())
    rows = {name: (name.partition("-")[0], made.case.name, *made.chosen) for name, made in named.items()}
    short = pairwise(rows.values(), first=[row for row in rows.values() if row[2:] == DEFAULT])
    return [
        pytest.param(made, id=name, marks=() if rows[name] in short else pytest.mark.slow)
        for name, made in named.items()
    ]


#: Initialisation, variant, backend and dtype of the laws that do not depend on the numbers.
DEFAULT = ("Default", "plain", "dense", torch.float32)
ALL = parameters()
#: One per layer case.
EACH_CASE = [p for p in ALL if p.values[0].chosen == DEFAULT]
#: Those that can be merged.
MERGEABLE = [p for p in ALL if not p.values[0].unmergeable]


def copied(module: nn.Module) -> nn.Module:
    """A deep copy."""
    return copy.deepcopy(module)


def is_rounding_notice(warning: Any) -> bool:
    """Whether a warning only says that 16-bit weights round an update away."""
    return issubclass(warning.category, VeneerWarning) and "rounding" in str(warning.message)
