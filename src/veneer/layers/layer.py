"""The LoRA layer, common to every geometry.

A subclass defines which module types it wraps, the shapes of its factors, how a matrix update fits the base
weight, and how the branch is computed. Everything else is here: the forward, the interface for variants, and
adding, changing and removing adapters. Merging is in `veneer.merge`, the initial factors are in
`veneer.layers.start`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Reversible, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from veneer import backends, inits, merge, variants
from veneer.adapters import as_names
from veneer.errors import AdapterNameError, Hint, MergeError, TargetError, Text
from veneer.inits import InitResult, folded
from veneer.layers.factor import NOTHING, RESIDUAL, Factor, Frozen, empty, operate, stand_in
from veneer.layers.refused import refusal
from veneer.layers.strengths import Strengths
from veneer.merge import Mergeable
from veneer.ops.dropout import wants_plain_torch, zero_dropped_
from veneer.ops.mixed_batch import Run, along_rows, on_gathered_rows, own_rows
from veneer.ops.row_norms import State
from veneer.ops.rows import add_to_rows_, scale_rows_
from veneer.registry import TypeRegistry
from veneer.rollback import Undo, Update
from veneer.routing import Routing, acting, call_by_rows, current, draws_of
from veneer.sharded import gathered, is_distributed
from veneer.spec import LoraSpec
from veneer.variants import Variant, scaled_branch
from veneer.wording import warn

registry: TypeRegistry[type[LoraLayer]] = TypeRegistry("layer")


def find(module: nn.Module) -> type[LoraLayer] | None:
    """The layer class that adapts such a module, or None.

    It is found by the module's type, or by the type that a storage names if its modules derive from no torch
    layer.
    """
    if refusal(module) is not None:
        return None
    found = registry.find(type(module))
    named = None if found is not None else backends.geometry(type(module))
    return found if named is None else registry.get(named)


@dataclass(frozen=True)
class Prepared:
    """An adapter of one layer, ready to be stored without allocating anything.

    Attributes:
        spec: What the layer gets.
        parts: The factors, the dropout and further parameters, by the names of their containers.
        strengths: Its strength, and those of the layer's other adapters if their tensors have to move.
        write_base: Replaces the base weight; None to keep it.
    """

    spec: LoraSpec
    parts: Mapping[str, nn.Module | nn.Parameter]
    strengths: Strengths
    write_base: Callable[[], None] | None


def _by_adapter(read: Callable[[LoraSpec], Any], doc: str) -> property:
    """A property that PEFT's layers have too: a setting by adapter name."""
    return property(lambda self: {name: read(spec) for name, spec in self._specs.items()}, doc=doc)


class LoraLayer(Mergeable):
    """A module with low-rank branches: ``y = base(x) + Σ s·B(A(dropout(x)))``.

    The branches of the active adapters are added, except those that are merged into the base weight.
    `forward` never writes.

    Args:
        base_layer: The module to adapt, kept as it is under this name.
    """

    prefix: ClassVar[str] = "lora_"
    #: Names of the containers in which adapters have tensors, by adapter name.
    adapter_layer_names: tuple[str, ...] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    #: Types that this class wraps, as "module.QualName"; their subclasses are served too.
    wraps: ClassVar[tuple[str, ...]] = ()
    #: Names of the containers of the two factors.
    factor_names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    #: Whether ``all-linear`` includes it.
    linear: ClassVar[bool] = False
    #: The base weight is stored (in, out).
    transposed: ClassVar[bool] = False
    #: The layer looks rows up instead of multiplying.
    lookup: ClassVar[bool] = False
    #: Its input is one tensor of rows that A is multiplied with; see `rows`.
    takes_rows: ClassVar[bool] = True
    #: Modules inside the base are targets of their own.
    transparent: ClassVar[bool] = False
    #: Children of the base that are adapted along with it, and how often the update of each counts.
    adapts_inside: ClassVar[Mapping[str, int]] = NOTHING

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    base_layer: nn.Module
    lora_dropout: nn.ModuleDict
    scaling: Strengths
    #: Whether the active adapters allow `fused_step`; it is computed when they change.
    fused: bool
    _specs: dict[str, LoraSpec]
    #: The adapters whose branches are added.
    _live: tuple[str, ...]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(training=base_layer.training, scaling=Strengths(), fused=False, _specs={}, _live=())
        self._modules["base_layer"] = base_layer
        for name in self.factor_names:
            self._modules[name] = self.new_container()
        self._modules["lora_dropout"] = empty()
        self._modules["_undo"] = self._modules.pop("_undo")  # shown last

    def __init_subclass__(cls) -> None:
        if "wraps" in cls.__dict__:  # others, such as FSDP2's, only extend a class
            registry.add(cls.wraps, cls)

    # -- forward ---------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``base(x) + Σ s·B(A(dropout(x)))`` over the active adapters that are not merged.

        With ``adapter_names``, each row of x goes through its own adapter instead: see `PeftModel.forward`.
        """
        if "adapter_names" in kwargs:
            return call_by_rows(self, kwargs.pop("adapter_names"), x, *args, **kwargs)  # type: ignore[no-any-return]
        if (routing := current(self)) is not None:
            mixed = self.mixed(routing, x, *args, **kwargs)
            if routing.tokens is not None:
                routing.tokens.pass_on(x, mixed)
            return mixed
        if self.fused and not args and not kwargs and (fused := self.fused_step(x)) is not None:
            return fused
        if self._disabled and self._merged:
            return self.original_base()(x, *args, **kwargs)  # type: ignore[no-any-return]
        y: Tensor = self.base_layer(x, *args, **kwargs)
        first = y

        def base() -> Tensor:
            return self.original_base()(x, *args, **kwargs) if self._merged else first

        for name in self._live:
            y = self.variant(name).forward(self, name, x, y, base)
        return y

    def fused_step(self, x: Tensor) -> Tensor | None:
        """The whole forward in one step, if this call allows it; else None."""
        return None

    def may_fuse(self) -> bool:
        """Whether the active adapters allow `fused_step`. Conditions on the call are checked there."""
        return False

    def mixed(self, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus, for each row, the branch of the row's own adapter."""
        y: Tensor = self.original_base()(x, *args, **kwargs)
        if self._disabled or not self._specs or not routing.count:
            return y
        if torch.compiler.is_compiling():
            if self._of_an_expert():
                self.row_names(routing, x)
            return self.add_slots(routing, x, y)
        if not routing.concerns(self._specs):
            return y
        return self.add_rows(routing, self.row_names(routing, x), x, y)

    def row_names(self, routing: Routing, x: Tensor) -> tuple[str | None, ...]:
        """The adapter of each row of x, None for one that is not here; see `Routing.rows_of`."""
        return routing.rows_of(x, tuple(self._specs), self._where, chosen=self._of_an_expert())

    def _of_an_expert(self) -> bool:
        """Whether the layer may get tokens that were chosen for it."""
        return "experts" in self._where().split(".")

    def add_rows(self, routing: Routing, names: tuple[str | None, ...], x: Tensor, result: Tensor) -> Tensor:
        """``result`` with the branch of each row's own adapter added.

        Args:
            routing: Of the call that runs.
            names: The adapter of each row, None for none.
            x: (rows, ...) as the base takes it.
            result: (rows, ...), the base's output, fresh.
        """
        layout = routing.layouts(names)[-1]

        def together(own: Tensor, result: Tensor, fresh: bool) -> Tensor:
            inputs = torch.split(own, [stop - start for _, start, stop in layout.runs])
            if routing.tokens is not None:
                for part in inputs:
                    routing.tokens.pass_on(x, part)
            return self._add_runs(layout.runs, inputs, result, fresh)

        fresh = backends.gives_fresh_output(self.get_base_layer())
        order = None if layout.order is None else routing.order(layout.order, result.device)
        return on_gathered_rows(x, result, together, order, fresh=fresh)

    def _add_runs(self, runs: Sequence[Run], inputs: Sequence[Tensor], result: Tensor, fresh: bool) -> Tensor:
        """`add_rows` for adapters whose rows lie side by side, in place where the contribution is known."""
        known = not wants_plain_torch(*inputs, result)
        added: list[tuple[slice, Tensor, float]] = []
        scaled: list[tuple[slice, Tensor]] = []
        dropped: list[tuple[slice, str, Tensor, Tensor]] = []
        others: dict[int, str] = {}
        for i, ((name, start, stop), own) in enumerate(zip(runs, inputs, strict=True)):
            if name is None:
                continue
            rows, scale = slice(start, stop), self.variant(name).output_scale(self, name) if known else None
            if scale is None:
                others[i] = name
            elif isinstance(scale, Tensor) and self.dropout_of(name):
                dropped.append((rows, name, self.dropped(name, own), scale))
            else:
                added.append((rows, self.low_rank(name, self.dropped(name, own)), self.strength(name)))
                if isinstance(scale, Tensor):
                    scaled.append((rows, scale))
        added += self._scaled_branches(dropped, result)
        if added:
            result = add_to_rows_(result, added, inplace=fresh)
        if scaled:
            result = scale_rows_(result, scaled, self.base_bias(result), inplace=True)
        if not others:
            return result
        parts = list(torch.split(result, [stop - start for _, start, stop in runs]))
        for i, name in others.items():
            own = parts[i]
            part = self.variant(name).forward(self, name, inputs[i], own, lambda own=own: own)  # type: ignore[misc]
            parts[i] = part.to(result)
        return torch.cat(parts)

    def _scaled_branches(
        self, dropped: Sequence[tuple[slice, str, Tensor, Tensor]], result: Tensor
    ) -> list[tuple[slice, Tensor, float]]:
        """What adapters that scale the base add with dropout: one product of the base for all of them."""
        if not dropped:
            return []
        inputs = [x.to(result.device) for _, _, x, _ in dropped]
        plain = torch.split(self.base_linear(torch.cat(inputs)).to(result), [len(x) for x in inputs])
        return [
            (rows, scaled_branch(self, name, x, own, scale), 1.0)
            for (rows, name, x, scale), own in zip(dropped, plain, strict=True)
        ]

    def add_slots(self, routing: Routing, x: Tensor, result: Tensor) -> Tensor:
        """As `add_rows`, for a compiler: the adapters of the rows are data, so the graph can be reused.

        Every row goes through every adapter of the layer.
        """
        base = result
        for name, mine in routing.slots(tuple(self._specs), x, self._where):
            own = own_rows(base, mine)
            part = self.variant(name).forward(self, name, own_rows(x, mine), own, lambda own=own: own)  # type: ignore[misc]
            result = torch.where(along_rows(mine, result), part.to(result), result)
        return result

    # -- geometry: what a subclass supplies ------------------------------------------------------------

    @classmethod
    def shapes(cls, base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B as stored, for a rank."""
        raise NotImplementedError

    @classmethod
    def refuses(cls, base: nn.Module, spec: LoraSpec) -> str | Text | None:
        """Why this module cannot get what ``spec`` asks for, or None."""
        return None

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """``B(A(x))``, unscaled and without dropout. x: as the base takes it -> as the base gives it."""
        raise NotImplementedError

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors as matrices whose product is the update: B (out, r), A (r, in·k…)."""
        return b.flatten(1), a.flatten(1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The update of factors as a matrix (out, in·k…), unscaled."""
        b2, a2 = self.matrices(a, b)
        return b2 @ a2

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

    def before_merge(self, weight: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The weight that an update can be added to, and the base's attributes that go with it.

        Almost always the weight itself. A layer whose update does not fit the base's weight (such as a
        convolution with groups) returns an equivalent weight.
        """
        return weight, {}

    def is_matrix(self) -> bool:
        """Whether the update is one product ``B @ A`` of the stored factors."""
        return True

    def is_linear(self) -> bool:
        """Whether the branch is linear in A. It is not if the base's forward does more with its weight."""
        return True

    def refuses_combination(self) -> str | None:
        """Why updates of this layer cannot be combined with those of another adapter, or None."""
        return None

    # -- what a variant sees ---------------------------------------------------------------------------

    def variant(self, name: str) -> Variant:
        return variants.get(self._specs[name].variant)

    def add_branch(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + s · B(A(dropout(x)))``, in the type of ``result``."""
        branch = self.low_rank(name, self.dropped(name, x))
        return result + (branch * self.strength(name)).to(result)

    def strength(self, name: str) -> float:
        """``s`` of an adapter; under a compiler as a tensor without dimensions, which multiplies the same."""
        if torch.compiler.is_compiling():
            return self.scaling.tensors[name]  # type: ignore[return-value]
        return self.scaling[name]

    def dropout_of(self, name: str) -> float:
        """The probability with which the branch drops elements of its input now; 0 in evaluation."""
        dropout: Any = self._modules["lora_dropout"]._modules[name]  # type: ignore[union-attr]
        return float(dropout.p) if dropout.training else 0.0

    def dropped(self, name: str, x: Tensor) -> Tensor:
        """``dropout(x)``, on the factors' device."""
        x = self.to_factors(name, x)
        draws, p = draws_of(name, x), self.dropout_of(name)
        if draws is not None and 0.0 < p < 1.0:
            flat = x.flatten(0, 1) if draws.filled > 1 and x.dim() > 2 else x
            return zero_dropped_(x.clone(memory_format=torch.contiguous_format), draws.draw(flat, p)) / (
                1.0 - p
            )
        return self.lora_dropout[name](x)  # type: ignore[no-any-return]

    def to_factors(self, name: str, x: Tensor) -> Tensor:
        """``x`` on the device of the factors, which may differ in a model that is spread over devices."""
        device = self.factors(name)[0].device
        return x if device.type == "meta" else x.to(device)  # offloaded factors are fetched when called

    def acting(self, name: str, x: Tensor) -> Tensor:
        """The positions on which an adapter acts in the current call. x: (..., in) -> (...) of bool.

        Raises:
            RoutingError: The call does not define them.
        """
        return acting(self, name, self._specs[name].path or type(self).__name__, x)

    def base_linear(self, x: Tensor) -> Tensor:
        """The output of the base for x, without its bias and without any adapter, merged or not."""
        return self.without_bias(self.original_base()(x))

    def without_bias(self, output: Tensor) -> Tensor:
        """An output of the base minus its bias."""
        bias = self.base_bias(output)
        return output if bias is None else output - bias

    def base_bias(self, output: Tensor) -> Tensor | None:
        """The bias of the base, shaped to broadcast with an output and of its type."""
        base = self.original_base()
        bias = getattr(base, "bias", None)
        if not isinstance(bias, Tensor):
            return None
        if bias.is_meta:
            bias = backends.find(base).read(base, "bias")
        return self.along_output(gathered(bias).to(output))

    def along_output(self, vector: Tensor) -> Tensor:
        """One number for each output feature, shaped to broadcast with an output."""
        return vector.reshape(-1, *(1,) * (-self.out_axis - 1))

    def matrix(self) -> Tensor:
        """The base weight without any adapter as a dense matrix (out, in·k…), detached.

        Raises:
            TargetError: The base is sharded in a way that hides its weight.
        """
        base = self.original_base()
        weight = gathered(backends.find(base, self.weight_name).read(base, self.weight_name))
        if weight.dim() < 2:
            raise TargetError(
                "an adapter needs the base's weight (",
                Hint("use_dora", True),
                "), which FSDP1 holds in pieces: the base layer is a unit of its own. Wrap whole adapted "
                "layers or blocks (ModuleWrapPolicy({LoraLayer})), or use FSDP2 (fully_shard)",
            )
        return self.to_matrix(self.before_merge(weight)[0])

    def weight_state(self) -> object:
        """A value that compares equal as long as `matrix` returns the same; None if that is unknown."""
        weight = self.original_base()._parameters.get(self.weight_name)
        return None if weight is None else State.of(weight)

    def update(self, name: str) -> tuple[Tensor, Tensor]:
        """The update as matrices B (out, r) and A (r, in·k…): what `low_rank` multiplies with, unscaled."""
        a, b, _ = self.update_factors(name)
        return self.matrices(a, b)

    def extra(self, name: str) -> dict[str, Tensor]:
        """The further parameters of an adapter's variant, by their names."""
        known = (*self.factor_names, *RESIDUAL, "lora_dropout")
        return {key: Factor.read(part) for key, part in self._parts(name).items() if key not in known}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True, for code that asks each layer of PEFT: every adapter here is a LoRA."""
        return True

    # -- the base --------------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        return self._modules["base_layer"]  # type: ignore[return-value]

    def base_device(self) -> torch.device:
        return self.backend.tensor_device(self.get_base_layer(), self.weight_name)

    def geometry(self) -> nn.Module:
        """The base layer with its attributes from before merging; its values may be merged."""
        return self.get_base_layer() if self._modules["_undo"] is None else self.original_base()

    def original_base(self) -> nn.Module:
        """The base layer without any adapter, also while adapters are merged.

        Raises:
            MergeError: Adapters were merged without an undo.
        """
        undo, base = self._modules["_undo"], self.get_base_layer()
        if undo is None:
            if self._merged:
                raise MergeError(merge.original_is_gone(self._merged))
            return base
        assert isinstance(undo, Undo)
        tensors = undo.tensors()
        bias = getattr(base, "bias", None)
        if isinstance(bias, Tensor) and bias.is_meta and "bias" not in tensors:
            tensors["bias"] = self.backend.read(base, "bias")
        if not undo.coded:  # compilers cannot trace the search for a backend
            return stand_in(base, tensors, undo.attributes)
        own = {key: tensors.pop(key) for key in ("bias",) if key in tensors}
        parts, more = self.backend.parts(base, tensors)
        return stand_in(base, {**parts, **own}, {**more, **undo.attributes})

    def inner(self) -> Reversible[tuple[str, nn.Module | None]]:
        return (("base_layer", self._modules["base_layer"]),)

    if not TYPE_CHECKING:  # a type checker should notice a method that does not exist

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

    @property
    def in_features(self) -> int:
        """Features of the input: rows of an embedding, channels of a convolution."""
        base = self.get_base_layer()
        size = getattr(base, "in_features", getattr(base, "in_channels", None))
        return self.shapes(self.geometry(), 1)[0][1] if size is None else size

    @property
    def out_features(self) -> int:
        """Features of the output: the width of an embedding, channels of a convolution."""
        base = self.get_base_layer()
        size = getattr(base, "out_features", getattr(base, "out_channels", None))
        return self.shapes(self.geometry(), 1)[1][0] if size is None else size

    # -- what adapters hold here -----------------------------------------------------------------------

    r = _by_adapter(lambda spec: spec.r, "Rank by adapter name.")
    lora_alpha = _by_adapter(lambda spec: spec.lora_alpha, "``lora_alpha`` by adapter name.")
    use_rslora = _by_adapter(
        lambda spec: spec.use_rslora, "Whether ``s = lora_alpha / √r``, by adapter name."
    )
    use_dora = _by_adapter(lambda spec: spec.variant == "dora", "Whether it is a DoRA, by adapter name.")
    lora_bias = _by_adapter(lambda spec: spec.lora_bias, "Whether B has a bias, by adapter name.")

    @property
    def held_adapters(self) -> tuple[str, ...]:
        return tuple(self._specs)

    @property
    def specs(self) -> Mapping[str, LoraSpec]:
        return MappingProxyType(self._specs)

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and the bias of B of an adapter, as stored."""
        modules: Mapping[str, Any] = self._modules
        a, b = (modules[key][name] for key in self.factor_names)
        return a.weight, b.weight, b.bias

    def residual(self, name: str) -> tuple[Tensor, Tensor] | None:
        """``(A₀, B₀)`` of an adapter whose update is ``s·(BA − B₀A₀)``, None for any other."""
        modules: Mapping[str, Any] = self._modules
        if RESIDUAL[0] not in modules or name not in modules[RESIDUAL[0]]:
            return None
        a, b = (modules[key][name].weight for key in RESIDUAL)
        return a, b

    def update_factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Factors whose product is the whole update, unscaled, and the bias of B; see `folded`."""
        modules: Mapping[str, Any] = self._modules
        parts = [modules[key][name] for key in self.factor_names]
        a, b = (part if isinstance(part, Tensor) else Factor.read(part) for part in parts)
        bias: Tensor | None = getattr(parts[1], "bias", None)
        residual = self.residual(name)
        return (a, b, bias) if residual is None else (*folded(a, b, residual), bias)

    def operators(self, name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """A and B of the whole update, each called as ``factor(x, operation)``: see `Factor`."""
        if self.residual(name) is None:
            return self.lora_A[name], self.lora_B[name]
        a, b, bias = self.update_factors(name)
        return partial(operate, a, None), partial(operate, b, bias)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        found: list[nn.Parameter] = []
        for key in self.adapter_layer_names:
            container: Any = self._modules.get(key)
            if container is None:
                continue
            # Not through the containers' methods, for speed: every switch of adapters calls this on each
            # layer.
            part: Any = container._modules.get(name)
            if type(part) is Factor:
                found += part._parameters.values()  # type: ignore[arg-type]  # none of them is None
                continue
            part = container._parameters.get(name) if part is None else part
            if part is not None:
                found += Factor.parameters_of(part)
        return iter(found)

    def trained_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Those of `adapter_parameters` that are trained: without B if the initialisation freezes it."""
        init = self._specs[name].init
        if init is True or not inits.find(init).freezes_b:  # the default is not looked up, for speed
            return self.adapter_parameters(name)
        b = self.factors(name)[1]
        return (parameter for parameter in self.adapter_parameters(name) if parameter is not b)

    def _parts(self, name: str) -> dict[str, Any]:
        """Everything that an adapter has in this layer, by the names of the containers."""
        found = {}
        for key in (*self.adapter_layer_names, "lora_dropout"):
            container: Any = self._modules.get(key)
            if container is not None and name in container:
                found[key] = container[name]
        return found

    def _put(self, name: str, parts: Mapping[str, nn.Module | nn.Parameter]) -> None:
        """Store an adapter's parts; no tensor is created."""
        for key, part in parts.items():
            if key not in self._modules:
                setattr(self, key, nn.ModuleDict())
                if key not in self.adapter_layer_names:
                    self.adapter_layer_names = (*self.adapter_layer_names, key)
            self._modules[key][name] = part  # type: ignore[index, operator]

    def _take(self, name: str) -> dict[str, Any]:
        """Remove an adapter's parts from the containers."""
        parts = self._parts(name)
        for key in parts:
            container: Any = self._modules[key]
            del container[name]
            if not container and key not in (*self.factor_names, "lora_dropout"):
                del self._modules[key]
        return parts

    # -- adapters come, change and go ------------------------------------------------------------------

    def new_container(self) -> nn.Module:
        return empty()

    def new_factors(
        self, name: str, a: Tensor, b: Tensor, bias: Tensor | None
    ) -> tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]:
        """The objects for A and B of an adapter in the two containers; nothing is stored."""
        return Factor(a), Factor(b, bias)

    def put_factors(self, name: str, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        self._put(name, dict(zip(self.factor_names, self.new_factors(name, a, b, bias), strict=True)))

    def prepared(
        self,
        spec: LoraSpec,
        start: InitResult,
        *,
        dtype: torch.dtype | None = None,
        strength: float | None = None,
        training: bool = False,
    ) -> Prepared:
        """Everything that a new adapter needs. Nothing is stored; `put_adapter` does that.

        Args:
            spec: What this layer gets.
            start: The factors, from an initialisation or a file.
            dtype: Type of the stored factors; None keeps the type that ``start`` has.
            strength: ``s``; None takes that of ``spec``.
            training: Activate its dropout even if the base is in evaluation mode.
        """
        device = start.a.device if start.a.is_meta else self.base_device()

        def place(tensor: Tensor, fresh: bool = False) -> Tensor:
            # A copy: a tensor of a mapped file is neither aligned nor safe from changes.
            return tensor.detach().to(device=device, dtype=dtype or tensor.dtype, copy=not fresh)

        a, b = place(start.a, start.fresh), place(start.b, start.fresh)
        bias = None if start.bias is None else place(start.bias, start.fresh)
        parts = dict(zip(self.factor_names, self.new_factors(spec.adapter, a, b, bias), strict=True))
        if start.residual is not None:
            parts.update(zip(RESIDUAL, (Frozen(place(tensor)) for tensor in start.residual), strict=True))
        parts.update({key: Factor(place(tensor)) for key, tensor in start.extra.items()})
        for part in parts.values():
            part.requires_grad_(False)
        dropout = nn.Dropout(p=spec.lora_dropout)
        dropout.training = training or self.get_base_layer().training
        parts["lora_dropout"] = dropout
        if start.unmeasured:
            spec = replace(spec, init=True)  # record the start that was used
        strength = spec.scaling if strength is None else strength
        write_base = None
        if start.base is not None:
            base, backend = self.get_base_layer(), self.backend
            weight = backend.read(base, self.weight_name)
            new = self.from_matrix(start.base, weight).to(weight)
            write_base = backend.writing(base, new, self.weight_name)
        return Prepared(spec, parts, self.scaling.with_one(spec.adapter, strength, device), write_base)

    def put_adapter(self, adapter: Prepared) -> None:
        """Store what `prepared` returned. No tensor is created, so it cannot run out of memory."""
        if adapter.write_base is not None:
            adapter.write_base()
        name = adapter.spec.adapter
        self._put(name, adapter.parts)
        if adapter.parts["lora_dropout"].training:  # type: ignore[union-attr]
            self.training = True  # so that a search for modules in training mode need not visit each adapter
        self._specs[name] = adapter.spec
        self.scaling.take_over(adapter.strengths)
        self.adapters_changed()

    def copying(self, old: str, new: str) -> Callable[[], None]:
        start = InitResult(*self.factors(old), residual=self.residual(old), extra=self.extra(old))
        adapter = self.prepared(
            replace(self._specs[old], adapter=new),
            start,
            strength=self.scaling[old],
            training=self.lora_dropout[old].training,
        )
        return partial(self.put_adapter, adapter)

    def drop_adapter(self, name: str) -> None:
        """Remove an adapter; if it is merged, the base weight is restored first."""
        if name in self._merged:
            self.unmerge([name])
        self._take(name)
        del self._specs[name], self.scaling[name]

    def move_adapter(self, old: str, new: str) -> None:
        self._put(new, self._take(old))
        self._specs[new] = replace(self._specs.pop(old), adapter=new)
        self.scaling[new] = self.scaling.pop(old)
        self.rename_merged(old, new)

    def note_start(self, name: str, init: bool | str) -> None:
        self._specs[name] = replace(self._specs[name], init=init)

    def respecify(self, spec: LoraSpec) -> None:
        """Change the recorded rank or strength of an adapter; its tensors stay."""
        self._specs[spec.adapter] = spec
        self.scaling[spec.adapter] = spec.scaling

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones.

        A merged adapter that is not among them is unmerged first, with a warning, because the layer always
        computes the base plus the active adapters.
        """
        if self._merged and (left := [n for n in self._merged if n not in as_names(adapter_names)]):
            warn(
                f"unmerging {', '.join(map(repr, left))}: no longer active. Merge again after set_adapter "
                "if wanted."
            )
            self.unmerge(left)
        super().set_adapter(adapter_names, inference_mode)

    def adapters_changed(self) -> None:
        """Update which branches a forward adds, and whether it may be fused."""
        names = () if self._disabled else self._active
        live = tuple([n for n in names if n in self._specs and n not in self._merged])
        self.__dict__["_live"] = live
        self.__dict__["fused"] = self.may_fuse()

    def set_strength(self, adapter_name: str, factor: float) -> None:
        if adapter_name in self._specs:
            self.scaling[adapter_name] = factor * self._specs[adapter_name].scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        self.set_strength(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for name in self._active:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters, or reset it to the configured one."""
        for name in self._active:
            if name in self.scaling:
                configured = self._specs[name].scaling
                self.scaling[name] = configured if scale is None else self.scaling[name] / scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        first = next(iter(self._modules[self.factor_names[0]].parameters()), None)  # type: ignore[union-attr]
        if first is not None:
            self.scaling.move(first.device)
        return self

    def _where(self) -> str:
        return next(iter(self._specs.values())).path or type(self).__name__

    # -- merging: see `veneer.merge` -------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The scaled update ``s·BA`` in the layout of the weight."""
        if adapter not in self._specs:
            raise AdapterNameError(f"this layer has no adapter {adapter!r}; it has: {list(self._specs)}")
        return merge.get_delta_weight(self, adapter)

    def update_of(self, name: str) -> Update:
        a, b, bias = (None if t is None else t.detach() for t in self.update_factors(name))
        extra = {key: tensor.detach() for key, tensor in self.extra(name).items()}
        return Update(a, b, bias, extra, self.scaling[name], self._specs[name].variant)  # type: ignore[arg-type]

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        """Reasons against merging these adapters in any storage; empty if there are none."""
        base = self.get_base_layer()
        parts = [self._modules[key][name] for key in self.factor_names for name in names]  # type: ignore[index]
        whole = all(isinstance(part, Tensor) or Factor.is_plain(part) for part in parts)
        if is_distributed(getattr(base, self.weight_name, None)) and not whole:
            return [
                "its factors are units of FSDP by themselves, which shows them where they are called alone: "
                "shard whole adapted layers or blocks, or merge where the base is whole"
            ]
        reasons = []
        unloaded = [repr(n) for n in names if any(p.is_meta for p in self.adapter_parameters(n))]
        if unloaded and self.base_device().type != "meta":
            reasons.append(f"the factors of {', '.join(unloaded)} were never loaded (low_cpu_mem_usage)")
        refused = {self.variant(name).refuses_merge(self._specs[name]) for name in names}
        reasons += sorted(reason for reason in refused if reason is not None)
        if self.merged_for_good and not all(self.variant(name).additive for name in names):
            reasons.append(merge.original_is_gone(self._merged))
        biased = [repr(n) for n in names if self._specs[n].lora_bias]
        if biased and getattr(base, "bias", None) is None:
            reasons.append(
                f"lora_bias of {', '.join(biased)} has no place to go: the base layer has no bias, and the "
                "architecture would drop one. Keep the adapter unmerged"
            )
        elif biased and (reason := self.backend.refuses_to_write(base, "bias")) is not None:
            reasons.append(reason)
        return reasons
