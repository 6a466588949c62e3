"""The one low-ranked layer: forward, merge, unmerge, add and remove, for every geometry.

A subclass says which module types it wraps, the shapes of its factors, how a matrix update lies in
the base weight, and how the branch is computed. Everything else is here, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer import backends, inits, variants
from veneer.adapters import AdapterModule, as_names
from veneer.errors import AdapterNameError, ConfigError, MergeError, VeneerWarning
from veneer.inits import InitRequest, InitResult, folded
from veneer.layers.refused import refusal
from veneer.ops.merging import kept_share, merge_dense, merge_into_
from veneer.ops.row_norms import State
from veneer.registry import TypeRegistry
from veneer.routing import Routing, acting, current
from veneer.spec import LoraSpec
from veneer.variants import ParameterRequest

registry: TypeRegistry[type[LoraLayer]] = TypeRegistry("layer")

_NOTHING: Mapping[str, Any] = MappingProxyType({})
#: Names of the frozen term ``A₀``, ``B₀`` of an adapter, for initialisations that subtract their start.
RESIDUAL = ("lora_residual_A", "lora_residual_B")


def find(module: nn.Module) -> type[LoraLayer] | None:
    """The layer class that adapts such a module, or None.

    It is known by the module's type; that of a storage whose modules derive from no torch layer by the type
    that the storage names instead.
    """
    if refusal(module) is not None:
        return None
    found = registry.find(type(module))
    named = None if found is not None else backends.geometry(type(module))
    return found if named is None else registry.get(named)


class Factor(nn.Module):
    """One thin factor: a weight with its operation, and no `torch.nn.Linear`.

    Whatever sweeps a model for linears (a quantiser, a second injection) leaves it alone.

    Args:
        weight: The factor.
        bias: Added by the operation, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor | None, operation: Callable[..., Tensor] = F.linear) -> Tensor:
        """``operation(x, weight, bias)`` in the type of ``x``: the factor is cast, never the activations."""
        if x is None:
            return operation(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return operation(x, self.weight.to(x.dtype), bias)

    @staticmethod
    def is_plain(module: nn.Module) -> bool:
        """Whether the tensors of a factor may be used without calling it.

        A factor that is sharded or offloaded by itself has them only while it is called.
        """
        return (
            type(module) is Factor
            and "forward" not in module.__dict__
            and not (module._forward_hooks or module._forward_pre_hooks)
        )

    @staticmethod
    def read(module: nn.Module) -> Tensor:
        """The weight of a factor: itself where it is there to read, else a copy that gradients go through."""
        if Factor.is_plain(module):
            return module.weight  # type: ignore[return-value]
        return module(None, _copy_of_weight)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The shape, for ``print(model)``."""
        return "×".join(map(str, self.weight.shape)) + (" + bias" if self.bias is not None else "")


class Frozen(nn.Module):
    """A tensor of an adapter that is not trained: a buffer, so no parameter, and in every state dict.

    Args:
        weight: The tensor.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


def _operate(
    weight: Tensor, bias: Tensor | None, x: Tensor, operation: Callable[..., Tensor] = F.linear
) -> Tensor:
    """What a `Factor` with that weight computes."""
    return operation(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _copy_of_weight(x: None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.clone()


class Undo(nn.Module):
    """The base's tensors as they were before merging.

    `coded` says that they are as a quantised storage keeps them, and not the weight itself.

    They are buffers that are not saved: they follow the layer to another device or dtype, into a
    deepcopy and a pickle, and stay out of every state dict.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], coded: bool = False
    ) -> None:
        super().__init__()
        self.coded = coded
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.attributes = dict(attributes)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their name on the base layer."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}


def stand_in(
    base: nn.Module, tensors: Mapping[str, Tensor | None], attributes: Mapping[str, Any] = _NOTHING
) -> nn.Module:
    """A copy of ``base`` that computes with other tensors; ``base`` itself is not touched.

    It shares everything but the named parameters and attributes, so a subclass's own forward runs as it
    is written. Offloading hooks are left out: the tensors given are the ones to compute with.
    """
    # Not copy.copy: compilers cannot follow it.
    twin: nn.Module = object.__new__(type(base))
    twin.__dict__.update(base.__dict__)
    state = twin.__dict__
    state["_parameters"] = {**base._parameters, **tensors}
    if "_hf_hook" in state:
        for name in ("forward", "_hf_hook", "_old_forward"):
            state.pop(name, None)
    state.update(attributes)
    return twin


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that shards, checkpoints and compilers put around one."""
    names = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
    while (inner := next((module._modules[n] for n in names if n in module._modules), None)) is not None:
        module = inner
    return module


class LoraLayer(AdapterModule):
    """A module with low-rank branches beside it: ``y = base(x) + Σ s·B(A(dropout(x)))``.

    The branches of the active adapters are added, except those that are merged into the base weight.
    `forward` never writes.

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
    adapts_inside: ClassVar[Mapping[str, int]] = _NOTHING

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict

    def __init_subclass__(cls) -> None:
        if "wraps" in cls.__dict__:  # others, such as FSDP2's, only dress a class up
            registry.add(cls.wraps, cls)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        for name in self.factor_names:
            setattr(self, name, self.new_container())
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self._specs: dict[str, LoraSpec] = {}
        self._merged: list[str] = []
        self._live: tuple[str, ...] = ()
        self._undo: Undo | None = None

    # -- geometry: what a subclass supplies ----------------------------------------------------

    @classmethod
    def shapes(cls, base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B as stored, for a rank."""
        raise NotImplementedError

    @classmethod
    def refuses(cls, base: nn.Module, spec: LoraSpec) -> str | None:
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
        return self.shapes(self.original_base(), 1)[1][:1]

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
        return nn.ModuleDict()

    def put_factors(self, name: str, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        """Store the factors of an adapter."""
        self.lora_A[name] = Factor(a)
        self.lora_B[name] = Factor(b, bias)

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and the bias of B of an adapter."""
        a, b = self.lora_A[name], self.lora_B[name]
        return a.weight, b.weight, b.bias  # type: ignore[return-value]

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
        return partial(_operate, a, None), partial(_operate, b, bias)

    def put_residual(self, name: str, residual: tuple[Tensor, Tensor]) -> None:
        """Store the frozen term of an adapter."""
        for key, tensor in zip(RESIDUAL, residual, strict=True):
            self._container_for(key)[name] = Frozen(tensor)

    def _container_for(self, key: str) -> Any:
        """The container of that name, made where there is none."""
        if key not in self._modules:
            setattr(self, key, nn.ModuleDict())
            if key not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, key)
        return self._container(key)

    def put_extra(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the parameters that an adapter's variant has beside the factors."""
        for key, tensor in tensors.items():
            self._container_for(key)[name] = Factor(tensor)

    def _extra_modules(self, name: str) -> dict[str, nn.Module]:
        """The modules that hold what `put_extra` stored."""
        return {key: m for key, m in self._beside_factors(name).items() if key not in RESIDUAL}

    def _beside_factors(self, name: str) -> dict[str, nn.Module]:
        """The modules that hold what an adapter has beside its factors: `put_extra` and `put_residual`."""
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
        return self.base_layer

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

    def original_base(self) -> nn.Module:
        """The base layer as it is without any adapter, also while some are merged."""
        if self._undo is None:
            return self.get_base_layer()
        base, tensors = self.get_base_layer(), self._undo.tensors()
        attributes = self._undo.attributes
        bias = getattr(base, "bias", None)
        if isinstance(bias, Tensor) and bias.is_meta and "bias" not in tensors:
            tensors["bias"] = self.backend.read(base, "bias")
        if not self._undo.coded:  # compilers cannot follow the search for a backend
            return stand_in(base, tensors, attributes)
        own = {key: tensors.pop(key) for key in ("bias",) if key in tensors}
        parts, more = self.backend.parts(base, tensors)
        return stand_in(base, {**parts, **own}, {**more, **attributes})

    def inner(self) -> Iterator[tuple[str, nn.Module | None]]:
        """The adapted module."""
        yield "base_layer", self.base_layer

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """A, B, the bias of B, and what the adapter's variant has beside them."""
        for tensor in self.factors(name):
            if tensor is not None:
                yield tensor  # type: ignore[misc]
        for module in self._extra_modules(name).values():
            yield module.weight  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in type(self).adapter_layer_names:
                return _NOTHING  # no adapter has such a tensor here
            # Code around the model reads `weight`, `in_features`, `stride`, … of the module it knows.
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    # -- adding and removing -----------------------------------------------------------------------

    def initialise(self, spec: LoraSpec, seed: int) -> InitResult:
        """Compute the factors that ``spec`` asks for; nothing is stored.

        Args:
            spec: What this layer gets.
            seed: The adapter's draw from torch's global generator.

        Raises:
            ConfigError: If the initialisation starts from data, and nothing was measured.
        """
        request, init = self._init_request(spec, seed), inits.find(spec.init)
        if init.lacks(request.stats):
            raise ConfigError(
                f"init_lora_weights={spec.init!r} starts from what was measured on data, and nothing was for "
                f"{spec.path or 'this module'}: call {init.measured_by} on this very model first"
            )
        start = init(request)
        return replace(start, extra=self._start_of_extra(spec, start, request))

    def _init_request(self, spec: LoraSpec, seed: int) -> InitRequest:
        base = self.original_base()
        shape_a, shape_b = self.shapes(base, spec.r)
        return InitRequest(
            spec=spec,
            shape_a=shape_a,
            shape_b=shape_b,
            bias=spec.lora_bias,
            lookup=self.lookup,
            matrix=lambda: self.to_matrix(backends.find(base, self.weight_name).read(base, self.weight_name)),
            seed=seed,
            stats=inits.statistics_of(self.get_base_layer(), self.weight_name),
        )

    def _parameter_request(
        self, spec: LoraSpec, start: InitResult | None, request: InitRequest
    ) -> ParameterRequest:
        def matrix() -> Tensor:
            assert start is not None
            return self.matrix() if start.base is None else start.base

        def update() -> tuple[Tensor, Tensor]:
            assert start is not None
            return self.matrices(*start.update())

        return ParameterRequest(
            spec=spec,
            vector_shape=self.vector_shape(),
            shape_a=request.shape_a,
            shape_b=request.shape_b,
            matrix=matrix,
            update=update,
            generator=request.generator,
        )

    def _start_of_extra(
        self, spec: LoraSpec, start: InitResult, request: InitRequest
    ) -> Mapping[str, Tensor]:
        variant = variants.get(spec.variant)
        asked = self._parameter_request(spec, start, request)
        shapes, tensors = variant.shapes(asked), variant.parameters(asked)
        given = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if given != {key: tuple(shape) for key, shape in shapes.items()}:
            raise ConfigError(
                f"the variant {spec.variant!r} announced parameters of the shapes {dict(shapes)}, "
                f"and gave {given}"
            )
        return tensors

    def tensor_shapes(self, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
        """Names on disk, below the module's path, of the tensors that an adapter has here, and their shapes.

        First A, B and the bias of B, if there is one; then the frozen term and what the variant has.
        """
        request = self._init_request(spec, 0)
        suffix = "" if self.lookup else ".weight"
        name_a, name_b = self.factor_names
        result = {f"{name_a}{suffix}": request.shape_a, f"{name_b}{suffix}": request.shape_b}
        if spec.lora_bias:
            result[f"{name_b}.bias"] = request.shape_b[:1]
        if inits.find(spec.init).subtracts_start:
            result.update(zip(RESIDUAL, (request.shape_a, request.shape_b), strict=True))
        more = variants.get(spec.variant).shapes(self._parameter_request(spec, None, request))
        return {**result, **{key: tuple(shape) for key, shape in more.items()}}

    def start_from(self, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> InitResult:
        """What an adapter starts with that was saved: tensors by the names of `tensor_shapes`.

        Absent factors are zero, and absent parameters of the variant start as for a new adapter.
        """
        shapes = self.tensor_shapes(spec)
        names = [key for key in shapes if key.startswith(self.factor_names)]
        values = [tensors[k] if k in tensors else torch.zeros(shapes[k], device="cpu") for k in names]
        residual = None
        if RESIDUAL[0] in shapes:
            a, b = (tensors.get(k, torch.zeros(shapes[k], device="cpu")) for k in RESIDUAL)
            residual = a, b
        start = InitResult(values[0], values[1], values[2] if len(values) > 2 else None, residual=residual)
        others = [key for key in shapes if key not in (*names, *RESIDUAL)]
        extra = {key: tensors[key] for key in others if key in tensors}
        if len(extra) < len(others):
            extra = {**self._start_of_extra(spec, start, self._init_request(spec, 0)), **extra}
        return replace(start, extra=extra)

    def add_adapter(self, spec: LoraSpec, start: InitResult, *, dtype: torch.dtype | None = None) -> None:
        """Store an adapter's factors, beside the base and in its floating type unless said otherwise.

        The adapter is neither activated nor trainable yet.

        Args:
            spec: What this layer gets.
            start: The factors, from `initialise` or from a file.
            dtype: Type of the stored factors; None keeps the type that ``start`` has.
        """
        device = start.a.device if start.a.is_meta else self.base_device()

        def place(tensor: Tensor) -> Tensor:
            # A copy, in memory of its own: a tensor of a mapped file is neither aligned nor safe from others.
            return tensor.detach().to(device=device, dtype=dtype or tensor.dtype, copy=True)

        if start.base is not None:
            self._replace_base(start.base)
        self.put_factors(
            spec.adapter,
            place(start.a),
            place(start.b),
            None if start.bias is None else place(start.bias),
        )
        if start.residual is not None:
            self.put_residual(spec.adapter, (place(start.residual[0]), place(start.residual[1])))
        self.put_extra(spec.adapter, {key: place(tensor) for key, tensor in start.extra.items()})
        self.lora_dropout[spec.adapter] = nn.Dropout(p=spec.lora_dropout).train(self.training)
        self._specs[spec.adapter] = spec
        self.scaling[spec.adapter] = spec.scaling
        for parameter in self.adapter_parameters(spec.adapter):
            parameter.requires_grad_(False)
        self.adapters_changed()

    def _replace_base(self, matrix: Tensor) -> None:
        base, backend = self.get_base_layer(), self.backend
        weight = backend.read(base, self.weight_name)
        backend.write(base, self.from_matrix(matrix, weight).to(weight), self.weight_name)

    def respecify(self, spec: LoraSpec) -> None:
        """Let an adapter that is held here have another rank or strength on paper; its tensors stay."""
        self._specs[spec.adapter] = spec
        self.scaling[spec.adapter] = spec.scaling

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; if it is merged, the base gets its weight back first."""
        if name in self._merged:
            self.unmerge([name])
        for container in self._containers(name):
            del container[name]
        for key in set(self.adapter_layer_names).difference(self.factor_names):
            if key in self._modules and not self._container(key):
                del self._modules[key]
        del self._specs[name]
        del self.scaling[name]

    def move_adapter(self, old: str, new: str) -> None:
        """Keep an adapter under another name."""
        for container in self._containers(old):
            container[new] = container[old]
            del container[old]
        self._specs[new] = replace(self._specs.pop(old), adapter=new)
        self.scaling[new] = self.scaling.pop(old)
        self._merged = [new if name == old else name for name in self._merged]

    def copy_adapter(self, old: str, new: str) -> None:
        """Store copies of an adapter's factors under another name, with the same strength."""
        a, b, bias = (None if t is None else t.detach().clone() for t in self.factors(old))
        assert a is not None and b is not None
        extra = {key: tensor.detach().clone() for key, tensor in self.extra(old).items()}
        start = InitResult(a, b, bias, residual=self.residual(old), extra=extra)
        self.add_adapter(replace(self._specs[old], adapter=new), start)
        self.scaling[new] = self.scaling[old]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones.

        An adapter that is merged and not among them is unmerged first, with a warning: the layer computes
        the base plus the active adapters, always.
        """
        names = as_names(adapter_names)
        left = [name for name in self._merged if name not in names]
        if left:
            warnings.warn(
                f"unmerging {', '.join(map(repr, left))}: no longer active. Merge again after set_adapter "
                "if wanted.",
                VeneerWarning,
                stacklevel=2,
            )
            self.unmerge(left)
        super().set_adapter(names, inference_mode=inference_mode)

    def adapters_changed(self) -> None:
        """Note which branches a forward adds."""
        if self._disabled:
            self._live = ()
        else:
            self._live = tuple(n for n in self._active if n in self._specs and n not in self._merged)

    # -- strength ------------------------------------------------------------------------------------

    def set_strength(self, adapter_name: str, factor: float) -> None:
        """Set ``s`` of an adapter to ``factor`` times what its configuration says."""
        if adapter_name in self._specs:
            self.scaling[adapter_name] = factor * self._specs[adapter_name].scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        """The same as `set_strength`: the field's spelling."""
        self.set_strength(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for name in self._active:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters, or set it back to the configured one."""
        for name in self._active:
            if name in self.scaling:
                self.scaling[name] = (
                    self._specs[name].scaling if scale is None else self.scaling[name] / scale
                )

    # -- forward ---------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus the branches of the active adapters that are not merged."""
        if (routing := current(self)) is not None:
            return self._forward_rows(routing, x, *args, **kwargs)
        if self._disabled and self._merged:
            return self.original_base()(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not self._live:
            return result
        base = partial(self._base_output, x, *args, known=None if self._merged else result, **kwargs)
        for name in self._live:
            result = self.apply_adapter(name, x, result, base)
        return result

    def apply_adapter(self, name: str, x: Tensor, result: Tensor, base: Callable[[], Tensor]) -> Tensor:
        """``result`` and what one adapter adds to it.

        Args:
            name: The adapter.
            x: The layer's input, or some of its rows.
            result: The output so far, for the same rows; not written.
            base: Gives the output of the base alone for them.
        """
        return variants.get(self._specs[name].variant).forward(self, name, x, result, base)

    def _base_output(self, x: Tensor, *args: Any, known: Tensor | None, **kwargs: Any) -> Tensor:
        return self.original_base()(x, *args, **kwargs) if known is None else known

    def _forward_rows(self, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus, for each row, the branch of the row's own adapter."""
        result: Tensor = self.original_base()(x, *args, **kwargs)
        if self._disabled or not any(name in self._specs for name in routing.used):
            return result
        where = next(iter(self._specs.values())).path or type(self).__name__
        names = routing.rows(x.shape[0] if x.dim() else 0, self.held_adapters, where)
        return self.add_rows(routing, names, x, result)

    def add_rows(self, routing: Routing, names: tuple[str | None, ...], x: Tensor, result: Tensor) -> Tensor:
        """``result`` with the branch of each row's own adapter added.

        Args:
            routing: Of the call that runs.
            names: The adapter of each row, None for none.
            x: (rows, ...) as the base takes it.
            result: (rows, ...), the base's output, fresh.
        """
        base = result
        for name, rows in routing.indices(names, x.device).items():
            if name is not None:
                there = rows.to(result.device)
                own = base[there]
                part = self.apply_adapter(name, x[rows], own, lambda own=own: own)  # type: ignore[misc]
                result = result.index_copy(0, there, part.to(result))
        return result

    def add_branch(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + s · B(A(dropout(x)))``, in the type of ``result``."""
        branch = self.low_rank(name, self.dropped(name, x))
        return result + (branch * self.scaling[name]).to(result)

    def dropout_of(self, name: str) -> float:
        """The probability with which the branch drops elements of its input now; 0 in evaluation."""
        dropout = self.lora_dropout[name]
        return float(dropout.p) if dropout.training else 0.0  # type: ignore[arg-type]

    def dropped(self, name: str, x: Tensor) -> Tensor:
        """``dropout(x)``, on the factors' device."""
        return self.lora_dropout[name](self.to_factors(name, x))  # type: ignore[no-any-return]

    def acting(self, name: str, x: Tensor) -> Tensor:
        """Where the call that runs lets an adapter act. x: (..., in) -> (...) of bool.

        Raises:
            RoutingError: The call does not say.
        """
        return acting(self, name, self._specs[name].path or type(self).__name__, x)

    def base_linear(self, x: Tensor) -> Tensor:
        """What the base alone gives for x, without its bias; nothing merged, no adapter."""
        return self.without_bias(self.original_base()(x))

    def without_bias(self, output: Tensor) -> Tensor:
        """An output of the base less the base's bias."""
        base = self.original_base()
        bias = getattr(base, "bias", None)
        if not isinstance(bias, Tensor):
            return output
        if bias.is_meta:
            bias = backends.find(base).read(base, "bias")
        return output - self.along_output(bias.to(output))

    def matrix(self) -> Tensor:
        """The base weight without any adapter as a dense matrix (out, in·k…), detached."""
        base = self.original_base()
        weight = backends.find(base, self.weight_name).read(base, self.weight_name)
        return self.to_matrix(self.before_merge(weight)[0])

    def weight_state(self) -> object:
        """Something that compares equal as long as `matrix` gives the same; None where that is unknown."""
        weight = self.original_base()._parameters.get(self.weight_name)
        return None if weight is None else State.of(weight)

    def update(self, name: str) -> tuple[Tensor, Tensor]:
        """The update as matrices B (out, r) and A (r, in·k…): what `low_rank` multiplies with, unscaled."""
        a, b, _ = self.update_factors(name)
        return self.matrices(a, b)

    def to_factors(self, name: str, x: Tensor) -> Tensor:
        """``x`` on the device of the factors: the two may differ in a model that is spread over devices."""
        device = self.factors(name)[0].device
        return x if device.type == "meta" else x.to(device)  # offloaded factors are fetched when called

    # -- merging ---------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The scaled update ``s·BA`` in the layout of the weight it is merged into."""
        if adapter not in self._specs:
            raise AdapterNameError(f"this layer has no adapter {adapter!r}; it has: {list(self._specs)}")
        weight, _ = self.before_merge(self._weight_meta())
        return self.from_matrix(self._dense_update(adapter), weight)

    def _dense_update(self, adapter: str) -> Tensor:
        """The scaled update as a matrix (out, in·k…)."""
        b2, a2 = self.update(adapter)
        return b2.detach() @ a2.detach() * self.scaling[adapter]

    def _weight_meta(self) -> Tensor:
        """The base weight's shape before merging, without its values."""
        base, name = self.original_base(), self.weight_name
        return backends.find(base, name).like(base, name)

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        """Why merging these adapters would be wrong; empty if it is right."""
        base, backend = self.get_base_layer(), self.backend
        reasons = []
        weight = getattr(base, self.weight_name, None)
        if isinstance(weight, Tensor) and weight.is_meta and self.base_device().type == "meta":
            reasons.append("the base weight is on the meta device: it has no values to merge into")
        if (reason := backend.refuses_to_write(base, self.weight_name)) is not None:
            reasons.append(reason)
        empty = [n for n in names if any(p.is_meta for p in self.adapter_parameters(n))]
        if empty and self.base_device().type != "meta":
            named = ", ".join(map(repr, empty))
            reasons.append(f"the factors of {named} were never loaded (low_cpu_mem_usage)")
        kinds = {variants.get(s.variant).refuses_merge(s) for s in map(self._specs.__getitem__, names)}
        reasons += sorted(reason for reason in kinds if reason is not None)
        biased = [n for n in names if self.factors(n)[2] is not None]
        if biased and getattr(base, "bias", None) is None:
            reasons.append(
                f"lora_bias of {', '.join(map(repr, biased))} has no place to go: the base layer has no "
                "bias, "
                "and the architecture would drop one. Keep the adapter unmerged"
            )
        return reasons

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        keep_undo: bool = True,
    ) -> float:
        """Add adapters into the base weight: ``W ← W + Σ s·BA``, rounded once from float32.

        Args:
            safe_merge: Refuse, before anything changes, if the result would not be finite.
            adapter_names: The adapters; None means the active ones. Those merged already, or not held
                here, are passed over.
            keep_undo: Keep what `unmerge` needs.

        Returns:
            The share of the update that survived rounding to the weight's type, in [0, 1]. Where the weight
            is quantised again, below 0 if that changes it by more than the update does.

        Raises:
            MergeError: If merging would give a wrong weight. Nothing has changed then.
        """
        asked = self._active if adapter_names is None else as_names(adapter_names)
        names = [n for n in asked if n in self._specs and n not in self._merged]
        if not names:
            return 1.0
        if reasons := self.refuses_merge(names):
            raise MergeError("; ".join(reasons))
        undo = self._undo
        if undo is None and keep_undo:
            undo = self._take_undo()
        if undo is not None and any(self.factors(n)[2] is not None for n in names):
            self._add_bias(undo)
        before = list(self._merged)
        try:
            if before and undo is not None:
                self._restore(undo)
            kept = self._merge_from_original([*before, *names], safe_merge)
        except Exception:
            if undo is not None:
                self._restore(undo)
                if before:
                    self._merge_from_original(before, False)
                self._drop_bias(undo, before)
            raise
        self._undo = undo
        self._merged = [*before, *names]
        self.adapters_changed()
        return kept

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Give the base weight back, bit for bit, whatever happened to the factors meanwhile.

        Args:
            adapter_names: The adapters to take out; None means all that are merged.

        Raises:
            MergeError: If the weight was merged without keeping an undo.
        """
        if not self._merged:
            return
        if self._undo is None:
            raise MergeError(
                "these adapters were merged without an undo (merge_and_unload): load the base again"
            )
        rest = [] if adapter_names is None else [n for n in self._merged if n not in as_names(adapter_names)]
        self._restore(self._undo)
        self._merged = rest
        if rest:
            self._merge_from_original(rest, False)
            self._drop_bias(self._undo, rest)
        else:
            self._undo = None
        self.adapters_changed()

    def _take_undo(self) -> Undo:
        base, name = self.get_base_layer(), self.weight_name
        _, attributes = self.before_merge(self.backend.like(base, name))
        coded = self.backend.quantization is not None
        return Undo(self.backend.keep(base, name), {key: getattr(base, key) for key in attributes}, coded)

    def _add_bias(self, undo: Undo) -> None:
        """Keep the base's bias too: only a merged bias changes it, and it may be trained by itself."""
        if "bias" not in undo.tensors():
            bias = self.backend.read(self.get_base_layer(), "bias")
            undo.register_buffer("bias", bias.clone(), persistent=False)

    def _drop_bias(self, undo: Undo, merged: Sequence[str]) -> None:
        """Keep no bias that no merged adapter changes: restored later, it would undo its training."""
        if not any(self.factors(n)[2] is not None for n in merged):
            undo._buffers.pop("bias", None)

    def _restore(self, undo: Undo) -> None:
        base, backend = self.get_base_layer(), self.backend
        tensors = undo.tensors()
        if (bias := tensors.pop("bias", None)) is not None:
            backend.write(base, bias, "bias")
        backend.put_back(base, tensors, self.weight_name)
        for name, value in undo.attributes.items():
            setattr(base, name, value)

    @torch.no_grad()
    def _merge_from_original(self, names: Sequence[str], check_finite: bool) -> float:
        """Write the weight with these adapters into a base that has none merged; the share kept."""
        base, backend = self.get_base_layer(), self.backend
        weight = backend.read(base, self.weight_name)
        kinds = {name: variants.get(self._specs[name].variant) for name in names}
        if self.linear and backend.writable_in_place(base) and all(v.additive for v in kinds.values()):
            terms = [(*self.update(n), self.scaling[n]) for n in names]
            kept = merge_into_(weight, terms, transpose=self.transposed, check_finite=check_finite)
        else:
            start, attributes = self.before_merge(weight)
            wide = torch.promote_types(start.dtype, torch.float32)
            matrix = self.to_matrix(start).to(wide)
            total = torch.zeros_like(matrix)
            for name, variant in kinds.items():
                extra = {key: tensor.detach().to(matrix) for key, tensor in self.extra(name).items()}
                total += variant.merged(matrix, self._dense_update(name).to(matrix), extra) - matrix
            delta = self.from_matrix(total, start)
            new, kept = merge_dense(start, delta)
            if check_finite and not bool(new.isfinite().all()):
                raise MergeError("the merged weight would hold infinite or undefined values")
            if backend.quantization is None:
                backend.write(base, new, self.weight_name)
            else:
                target = start.to(wide) + delta
                backend.write(base, target, self.weight_name)
                kept = kept_share(delta, backend.read(base, self.weight_name).to(wide) - target)
            for key, value in attributes.items():
                setattr(base, key, value)
        self._merge_biases(names)
        return kept

    def _merge_biases(self, names: Sequence[str]) -> None:
        biases = [(self.factors(n)[2], self.scaling[n]) for n in names]
        if not any(bias is not None for bias, _ in biases):
            return
        base, backend = self.get_base_layer(), self.backend
        bias = backend.read(base, "bias")
        total = bias.to(torch.promote_types(bias.dtype, torch.float32))
        for term, scaling in biases:
            if term is not None:
                total = total + term.detach().to(total) * scaling
        backend.write(base, total.to(bias.dtype), "bias")
