"""Adapters that come to a layer, change and leave it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from veneer import backends, inits, variants
from veneer.adapters import as_names
from veneer.errors import ConfigError, Hint, VeneerWarning
from veneer.inits import InitRequest, InitResult
from veneer.layers.factor import RESIDUAL, Factor, Frozen, Prepared
from veneer.layers.merging import Mergeable
from veneer.spec import LoraSpec
from veneer.variants import ParameterRequest


class Changeable(Mergeable):
    """A layer that adapters are added to, renamed in, weighed in and dropped from."""

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
                Hint("init_lora_weights", spec.init),
                " starts from what was measured on data, and nothing was for "
                f"{spec.path or 'this module'}: call {init.measured_by} on this very model first",
            )
        start = init(request)
        extra = self._start_of_extra(spec, start, request)
        return replace(start, extra=extra) if extra else start

    def _init_request(self, spec: LoraSpec, seed: int) -> InitRequest:
        shape_a, shape_b = self.shapes(self.geometry(), spec.r)
        return InitRequest(
            spec=spec,
            shape_a=shape_a,
            shape_b=shape_b,
            bias=spec.lora_bias,
            lookup=self.lookup,
            matrix=self._matrix_of_weight,
            seed=seed,
            stats=inits.statistics_of(self.get_base_layer(), self.weight_name),
        )

    def _matrix_of_weight(self) -> Tensor:
        base = self.original_base()
        return self.to_matrix(backends.find(base, self.weight_name).read(base, self.weight_name))

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
        if not variant.has_parameters:
            return {}
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
        variant = variants.get(spec.variant)
        if not variant.has_parameters:
            return result
        more = variant.shapes(self._parameter_request(spec, None, request))
        return {**result, **{key: tuple(shape) for key, shape in more.items()}}

    def start_from(
        self, spec: LoraSpec, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> InitResult:
        """What an adapter starts with that was saved.

        Absent factors are zero, and absent parameters of the variant start as for a new adapter.

        Args:
            spec: What this layer gets.
            tensors: By the names of `tensor_shapes`, as far as they are there.
            shapes: What `tensor_shapes` gives.
        """
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
        return replace(start, extra=extra) if extra else start

    def add_adapter(
        self,
        spec: LoraSpec,
        start: InitResult,
        *,
        dtype: torch.dtype | None = None,
        training: bool = False,
    ) -> None:
        """Store an adapter's factors, beside the base and in its floating type unless said otherwise.

        The adapter is neither activated nor trainable yet.

        Args:
            spec: What this layer gets.
            start: The factors, from `initialise` or from a file.
            dtype: Type of the stored factors; None keeps the type that ``start`` has.
            training: Let its dropout act from the start, also where the base is in evaluation.
        """
        self.put_adapter(self.prepared(spec, start, dtype=dtype, training=training))

    def prepared(
        self,
        spec: LoraSpec,
        start: InitResult,
        *,
        dtype: torch.dtype | None = None,
        strength: float | None = None,
        training: bool = False,
    ) -> Prepared:
        """Everything that `add_adapter` has to make. Nothing is stored; `put_adapter` does that.

        Args:
            spec: What this layer gets.
            start: The factors.
            dtype: See `add_adapter`.
            strength: ``s``; None takes that of ``spec``.
            training: Let its dropout act from the start, also where the base is in evaluation.
        """
        device = start.a.device if start.a.is_meta else self.base_device()

        def place(tensor: Tensor, fresh: bool = False) -> Tensor:
            # A copy, in memory of its own: a tensor of a mapped file is neither aligned nor safe from others.
            return tensor.detach().to(device=device, dtype=dtype or tensor.dtype, copy=not fresh)

        bias = None if start.bias is None else place(start.bias, start.fresh)
        factors = self.new_factors(
            spec.adapter, place(start.a, start.fresh), place(start.b, start.fresh), bias
        )
        held = dict(zip(self.factor_names, factors, strict=True))
        if start.residual is not None:
            held.update(zip(RESIDUAL, (Frozen(place(tensor)) for tensor in start.residual), strict=True))
        held.update({key: Factor(place(tensor)) for key, tensor in start.extra.items()})
        for part in held.values():
            part.requires_grad_(False)
        if start.unmeasured:
            spec = replace(spec, init=True)  # what a layer says of its start is what it is
        strength = spec.scaling if strength is None else strength
        dropout = nn.Dropout(p=spec.lora_dropout)
        dropout.training = training or self.get_base_layer().training
        return Prepared(
            spec,
            held,
            dropout,
            self.scaling.with_one(spec.adapter, strength, device),  # type: ignore[attr-defined]
            None if start.base is None else self._writing_base(start.base),
        )

    def put_adapter(self, adapter: Prepared) -> None:
        """Store what `prepared` gave. It makes no tensor, so it does not fail for want of memory."""
        if adapter.write_base is not None:
            adapter.write_base()
        name = adapter.spec.adapter
        self._put(name, adapter.held)
        self.lora_dropout[name] = adapter.dropout
        if adapter.dropout.training:
            self.training = True  # so that whoever looks for what is in training need not ask each adapter
        self._specs[name] = adapter.spec
        self.scaling.take_over(adapter.strengths)  # type: ignore[attr-defined]
        self.adapters_changed()

    def _writing_base(self, matrix: Tensor) -> Callable[[], None]:
        base, backend = self.get_base_layer(), self.backend
        weight = backend.read(base, self.weight_name)
        return backend.writing(base, self.from_matrix(matrix, weight).to(weight), self.weight_name)

    def note_start(self, name: str, init: bool | str) -> None:
        """Note that the factors of an adapter began, or went on, from another start."""
        self._specs[name] = replace(self._specs[name], init=init)

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
        if self._undo is not None:
            updates = self._undo.updates
            self._undo.updates = {new if name == old else name: u for name, u in updates.items()}

    def copying(self, old: str, new: str) -> Callable[[], None]:
        """A call that stores copies of an adapter's factors under another name, with the same strength."""
        start = InitResult(*self.factors(old), residual=self.residual(old), extra=self.extra(old))
        adapter = self.prepared(
            replace(self._specs[old], adapter=new),
            start,
            strength=self.scaling[old],
            training=self.lora_dropout[old].training,
        )
        return partial(self.put_adapter, adapter)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones.

        An adapter that is merged and not among them is unmerged first, with a warning: the layer computes
        the base plus the active adapters, always.
        """
        if self._merged and (left := [n for n in self._merged if n not in as_names(adapter_names)]):
            warnings.warn(
                f"unmerging {', '.join(map(repr, left))}: no longer active. Merge again after set_adapter "
                "if wanted.",
                VeneerWarning,
                stacklevel=2,
            )
            self.unmerge(left)
        super().set_adapter(adapter_names, inference_mode)

    def adapters_changed(self) -> None:
        """Note which branches a forward adds."""
        names = () if self._disabled else self._active
        self.__dict__["_live"] = tuple([n for n in names if n in self._specs and n not in self._merged])

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
