"""What a low-ranked layer holds of its adapters, and the geometry that places it in the base weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Reversible, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer import backends
from veneer.adapters import AdapterModule
from veneer.errors import Hint, MergeError, TargetError, Text
from veneer.inits import folded
from veneer.layers.factor import (
    NOTHING,
    RESIDUAL,
    Factor,
    Undo,
    empty,
    operate,
    stand_in,
)
from veneer.layers.strengths import Strengths
from veneer.ops.row_norms import State
from veneer.sharded import gathered
from veneer.spec import LoraSpec


def original_is_gone(merged: Sequence[str]) -> str:
    """Why a weight cannot be had as it was before these adapters were merged."""
    return (
        f"{', '.join(map(repr, merged))} was merged without an undo (merge_and_unload, or undo=None), so the "
        "weight before that is gone: load the base again"
    )


class Holder(AdapterModule):
    """The base layer, and factors beside it by the names of their adapters.

    Args:
        base_layer: The module to adapt, kept as it is under this name.
    """

    prefix: ClassVar[str] = "lora_"
    adapter_layer_names: tuple[str, ...] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    #: Types that this class wraps, as "module.QualName"; their subclasses are served too.
    wraps: ClassVar[tuple[str, ...]] = ()
    #: Where the two factors live.
    factor_names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    #: ``all-linear`` means this kind.
    linear: ClassVar[bool] = False
    #: The base weight is stored (in, out).
    transposed: ClassVar[bool] = False
    #: The layer looks rows up instead of multiplying.
    lookup: ClassVar[bool] = False
    #: Its input is one tensor of rows that A is multiplied with; see `rows`.
    takes_rows: ClassVar[bool] = True
    #: The tensor of the base that is adapted.
    weight_name: str = "weight"
    #: Modules inside the base are targets of their own.
    transparent: ClassVar[bool] = False
    #: Children of the base that are adapted along with it, and how often the update of each counts.
    adapts_inside: ClassVar[Mapping[str, int]] = NOTHING

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    base_layer: nn.Module
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    _specs: dict[str, LoraSpec]
    _merged: list[str]
    _live: tuple[str, ...]
    _undo: Undo | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(training=base_layer.training, scaling=Strengths(), _specs={}, _merged=[], _live=())
        self._modules["base_layer"] = base_layer
        for name in self.factor_names:
            self._modules[name] = self.new_container()
        self._modules["lora_dropout"] = empty()
        self._modules["_undo"] = None  # a place from the start, as compiled code looks for it

    # -- geometry: what a subclass supplies ----------------------------------------------------

    @classmethod
    def shapes(cls, base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B as stored, for a rank."""
        raise NotImplementedError

    @classmethod
    def refuses(cls, base: nn.Module, spec: LoraSpec) -> str | Text | None:
        """Why this module cannot get what ``spec`` asks for, or None."""
        return None

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """``B(A(x))``, unscaled. x: as the base takes it -> as the base gives it."""
        raise NotImplementedError

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors as matrices whose product is the update: B (out, r), A (r, in·k…)."""
        return b.flatten(1), a.flatten(1)

    def rows(self, x: Tensor) -> Tensor:
        """The rows that A is multiplied with. x: as the base takes it -> (n, in·k…)."""
        return x.reshape(-1, x.shape[-1])

    def to_matrix(self, weight: Tensor) -> Tensor:
        """A base weight as the matrix (out, in·k…) that ``B @ A`` is added to."""
        return weight.T if self.transposed else weight.flatten(1)

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `to_matrix`, in the shape of ``like``."""
        return matrix.T if self.transposed else matrix.view_as(like)

    @property
    def out_axis(self) -> int:
        """The axis of the features in what the base gives, counted from the end."""
        return -1

    def vector_shape(self) -> tuple[int, ...]:
        """How one number for each output feature is stored."""
        return self.shapes(self.geometry(), 1)[1][:1]

    def along_output(self, vector: Tensor) -> Tensor:
        """One number for each output feature, shaped so that it multiplies an output."""
        return vector.reshape(-1, *(1,) * (-self.out_axis - 1))

    def before_merge(self, weight: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The weight that an update can be added to, and the base's attributes that go with it.

        Almost always the weight itself. A layer whose update does not fit the base's own parametrisation
        (see the convolution with groups) gives an equivalent weight here.
        """
        return weight, {}

    def is_matrix(self) -> bool:
        """Whether the update is one product ``B @ A`` of the stored factors."""
        return True

    def is_linear(self) -> bool:
        """Whether the branch is linear in A: not where the base's own forward does more with its weight."""
        return True

    def refuses_combination(self) -> str | None:
        """Why updates of this layer cannot be joined with those of another adapter, or None."""
        return None

    # -- containers ------------------------------------------------------------------------------

    def new_container(self) -> nn.Module:
        """An empty container of factors by adapter name."""
        return empty()

    def new_factors(
        self, name: str, a: Tensor, b: Tensor, bias: Tensor | None
    ) -> tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]:
        """What keeps A and B of an adapter in the two containers of factors; nothing is stored."""
        return Factor(a), Factor(b, bias)

    def put_factors(self, name: str, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        """Store the factors of an adapter."""
        self._put(name, dict(zip(self.factor_names, self.new_factors(name, a, b, bias), strict=True)))

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and the bias of B of an adapter."""
        a, b = self.lora_A[name], self.lora_B[name]
        return a.weight, b.weight, b.bias  # type: ignore[return-value]

    def bias_of(self, name: str) -> Tensor | None:
        """The bias of B of an adapter."""
        return getattr(self._container(self.factor_names[1])[name], "bias", None)

    def residual(self, name: str) -> tuple[Tensor, Tensor] | None:
        """``(A₀, B₀)`` of an adapter whose update is ``s·(BA − B₀A₀)``, None for any other."""
        if RESIDUAL[0] not in self._modules or name not in self._container(RESIDUAL[0]):
            return None
        a, b = (self._container(key)[name].weight for key in RESIDUAL)
        return a, b

    def update_factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Factors whose product is the whole update, unscaled, and the bias of B; see `folded`."""
        held = [self._container(key)[name] for key in self.factor_names]
        a, b = (t if isinstance(t, Tensor) else Factor.read(t) for t in held)
        residual = self.residual(name)
        bias: Tensor | None = getattr(held[1], "bias", None)
        return (a, b, bias) if residual is None else (*folded(a, b, residual), bias)

    def update_rank(self, name: str) -> int:
        """The rank of `update_factors`."""
        return self._specs[name].r * (1 if self.residual(name) is None else 2)

    def operators(self, name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """A and B of the whole update, each called as ``factor(x, operation)``: see `Factor`."""
        if self.residual(name) is None:
            return self.lora_A[name], self.lora_B[name]
        a, b, bias = self.update_factors(name)
        return partial(operate, a, None), partial(operate, b, bias)

    def _put(self, name: str, held: Mapping[str, nn.Module | nn.Parameter]) -> None:
        """Store what an adapter has, by the names of the containers; no tensor is made."""
        for key, part in held.items():
            self._container_for(key)[name] = part

    def _container_for(self, key: str) -> Any:
        """The container of that name, made where there is none."""
        if key not in self._modules:
            setattr(self, key, nn.ModuleDict())
            if key not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, key)
        return self._container(key)

    def _extra_modules(self, name: str) -> dict[str, nn.Module]:
        """The modules that hold what an adapter's variant has beside the factors."""
        return {key: m for key, m in self._beside_factors(name).items() if key not in RESIDUAL}

    def _beside_factors(self, name: str) -> dict[str, nn.Module]:
        """The modules that hold what an adapter has beside its factors."""
        names = [key for key in self.adapter_layer_names if key not in self.factor_names]
        held = {key: self._container(key) for key in names if key in self._modules}
        return {key: container[name] for key, container in held.items() if name in container}

    def _container(self, key: str) -> Any:
        return self._modules[key]

    def _containers(self, name: str) -> list[Any]:
        """Everything here that holds something of an adapter by its name."""
        keys = (*self.factor_names, *self._beside_factors(name), "lora_dropout")
        return [self._container(key) for key in keys]

    def extra(self, name: str) -> dict[str, Tensor]:
        """The parameters that an adapter's variant has beside the factors, by their name."""
        return {key: Factor.read(module) for key, module in self._extra_modules(name).items()}

    # -- what it holds ---------------------------------------------------------------------------

    @property
    def held_adapters(self) -> tuple[str, ...]:
        """Names of the adapters that have factors here."""
        return tuple(self._specs)

    @property
    def specs(self) -> Mapping[str, LoraSpec]:
        """What each adapter gave this layer when it was made."""
        return MappingProxyType(self._specs)

    @property
    def r(self) -> dict[str, int]:
        """Rank by adapter name."""
        return {name: spec.r for name, spec in self._specs.items()}

    @property
    def lora_alpha(self) -> dict[str, float]:
        """``lora_alpha`` by adapter name."""
        return {name: spec.lora_alpha for name, spec in self._specs.items()}

    def strength(self, name: str) -> float:
        """``s`` of an adapter; for a compiler as a tensor without dimensions, which multiplies alike."""
        if torch.compiler.is_compiling():
            return self.scaling.tensors[name]  # type: ignore[attr-defined, no-any-return]
        return self.scaling[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Holder:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        first = next(iter(self._modules[self.factor_names[0]].parameters()), None)  # type: ignore[union-attr]
        if first is not None:
            self.scaling.move(first.device)  # type: ignore[attr-defined]
        return self

    @property
    def use_rslora(self) -> dict[str, bool]:
        """Whether ``s = lora_alpha / √r``, by adapter name."""
        return {name: spec.use_rslora for name, spec in self._specs.items()}

    @property
    def use_dora(self) -> dict[str, bool]:
        """Whether the adapter is a DoRA, by adapter name."""
        return {name: spec.variant == "dora" for name, spec in self._specs.items()}

    @property
    def lora_bias(self) -> dict[str, bool]:
        """Whether B has a bias, by adapter name."""
        return {name: spec.lora_bias for name, spec in self._specs.items()}

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weight now."""
        return list(self._merged)

    @property
    def merged(self) -> bool:
        """True while any adapter is merged into the base weight."""
        return bool(self._merged)

    def get_base_layer(self) -> nn.Module:
        """The adapted module itself."""
        return self._modules["base_layer"]  # type: ignore[return-value]

    @property
    def backend(self) -> backends.Backend:
        """How the adapted tensor of the base is stored."""
        return backends.find(self.get_base_layer(), self.weight_name)

    def base_device(self) -> torch.device:
        """Where the factors belong."""
        return self.backend.tensor_device(self.get_base_layer(), self.weight_name)

    def base_dtype(self) -> torch.dtype:
        """The floating type that the base computes in."""
        return self.backend.tensor_dtype(self.get_base_layer(), self.weight_name)

    def geometry(self) -> nn.Module:
        """The base layer with the attributes that it has without adapters; its values may be merged ones."""
        return self.get_base_layer() if self._modules["_undo"] is None else self.original_base()

    def original_base(self) -> nn.Module:
        """The base layer as it is without any adapter, also while some are merged.

        Raises:
            MergeError: Adapters were merged without an undo.
        """
        if self._modules["_undo"] is None:
            if self._merged:
                raise MergeError(original_is_gone(self._merged))
            return self.get_base_layer()
        assert self._undo is not None
        base, tensors = self.get_base_layer(), self.before_merging()
        attributes = self._undo.attributes
        bias = getattr(base, "bias", None)
        if isinstance(bias, Tensor) and bias.is_meta and "bias" not in tensors:
            tensors["bias"] = self.backend.read(base, "bias")
        if not self._undo.coded:  # compilers cannot follow the search for a backend
            return stand_in(base, tensors, attributes)
        own = {key: tensors.pop(key) for key in ("bias",) if key in tensors}
        parts, more = self.backend.parts(base, tensors)
        return stand_in(base, {**parts, **own}, {**more, **attributes})

    def before_merging(self) -> dict[str, Tensor]:
        """The base's tensors that merging has changed, as they were, by name. Empty if none is merged.

        Raises:
            MergeError: Adapters were merged without an undo.
        """
        if self._undo is None:
            if self._merged:
                raise MergeError(original_is_gone(self._merged))
            return {}
        return self._undo.tensors()

    def inner(self) -> Reversible[tuple[str, nn.Module | None]]:
        """The adapted module."""
        return (("base_layer", self._modules["base_layer"]),)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """A, B, the bias of B, and what the adapter's variant has beside them."""
        found: list[nn.Parameter] = []
        modules: Mapping[str, Any] = self._modules
        for key in self.adapter_layer_names:
            container = modules.get(key)
            if container is None:
                continue
            # Past the containers' own methods: every switch of adapters asks each layer for these.
            held: Any = container._modules.get(name)
            if type(held) is Factor:
                found += held._parameters.values()  # type: ignore[arg-type]  # none of them is None
                continue
            held = container._parameters.get(name) if held is None else held
            if held is not None:
                found += Factor.parameters_of(held)
        return iter(found)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in type(self).adapter_layer_names:
                return NOTHING  # no adapter has such a tensor here
            # Code around the model reads `weight`, `in_features`, `stride`, … of the module it knows.
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    def matrix(self) -> Tensor:
        """The base weight without any adapter as a dense matrix (out, in·k…), detached.

        Raises:
            TargetError: The base is sharded by itself in a way that shows its weight to nobody else.
        """
        base = self.original_base()
        weight = gathered(backends.find(base, self.weight_name).read(base, self.weight_name))
        if weight.dim() < 2:
            raise TargetError(
                "an adapter needs the base's weight (",
                Hint("use_dora", True),
                "), which FSDP1 holds in pieces: the base "
                "layer is a unit of its own. Wrap whole adapted layers or blocks "
                "(ModuleWrapPolicy({LoraLayer})), or use FSDP2 (fully_shard)",
            )
        return self.to_matrix(self.before_merge(weight)[0])

    def weight_state(self) -> object:
        """Something that compares equal as long as `matrix` gives the same; None where that is unknown."""
        weight = self.original_base()._parameters.get(self.weight_name)
        return None if weight is None else State.of(weight)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The update of factors as a matrix (out, in·k…), unscaled."""
        b2, a2 = self.matrices(a, b)
        return b2 @ a2

    def update(self, name: str) -> tuple[Tensor, Tensor]:
        """The update as matrices B (out, r) and A (r, in·k…): what `low_rank` multiplies with, unscaled."""
        a, b, _ = self.update_factors(name)
        return self.matrices(a, b)
