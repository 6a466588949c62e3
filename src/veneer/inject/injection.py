"""An adapter that is ready to be put into a model, and the step that puts it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from veneer import backends
from veneer.adapters import AdapterSet
from veneer.config import LoraConfig
from veneer.errors import LoadMismatchError
from veneer.inits import InitResult, forget_statistics
from veneer.inject.base_tensors import (
    bias_parameters,
    differs_from_base,
    embedding_weights,
    writing_base_tensor,
)
from veneer.inject.encoder import keep_out_of_fused_kernels
from veneer.inject.replication import Replication, keep
from veneer.inject.sites import Site
from veneer.layers import LoraLayer
from veneer.layers.layer import Prepared
from veneer.layers.making import factor_dtype
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.start import initialise, start_from, tensor_shapes
from veneer.layers.trainable_tokens import PreparedRows, TrainableTokens
from veneer.spec import LoraSpec

# An adapter has three kinds of parts. Each has `keys`, the names on disk and the shapes of its tensors;
# `fill` takes their values from a file; `ready` makes all that the part needs in the model, and returns the
# call that puts it there. That call makes no tensor, so it does not fail for want of memory.


@dataclass
class Addition:
    """One layer that will get factors.

    Attributes:
        site: The module that it adapts, or a part of.
        layer: The layer.
        spec: What it gets.
        path: Where it will be in the adapted model, which is also its name on disk.
        new: Whether it takes its site's place.
        start: The factors.
    """

    site: Site
    layer: LoraLayer
    spec: LoraSpec
    path: str
    new: bool
    start: InitResult | None = None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(self.layer, self.spec)

    def keys(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.path}.{name}": shape for name, shape in self.shapes.items()}

    def initialise(self, seed: int, *, meta: bool) -> None:
        """Compute the starting factors; shapes without values for ``meta`` and on a base without values."""
        if meta or self.layer.base_device().type == "meta":
            self.fill({key: torch.empty(shape, device="meta") for key, shape in self.keys().items()})
        else:
            self.start = initialise(self.layer, self.spec, seed)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values from tensors with the names of `keys`, as far as they are there."""
        own = {name: tensors[key] for name in self.shapes if (key := f"{self.path}.{name}") in tensors}
        self.start = start_from(self.layer, self.spec, own, self.shapes)

    def ready(self, adapter: str, *, widen: bool, trainable: bool) -> Callable[[], None]:
        """Make the parameters; the returned call gives them to the layer and puts it in its place."""
        start, self.start = self.start, None  # what has been copied need not be kept
        assert start is not None
        dtype = factor_dtype(self.layer, widen)
        return partial(self._put, self.layer.prepared(self.spec, start, dtype=dtype, training=trainable))

    def _put(self, made: Prepared) -> None:
        self.layer.put_adapter(made)
        if self.new:
            self.site.replace(self.layer)
        forget_statistics(self.layer.get_base_layer())


@dataclass
class Copy:
    """One module that will be trained whole; one that follows another will share its weight."""

    site: Site
    wrapper: ModulesToSaveWrapper
    module: nn.Module
    follows: Copy | None = None

    def keys(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.site.path}.{k}": tuple(t.shape) for k, t in self.module.state_dict().items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values from tensors with the names of `keys`, as far as they are there."""
        own = {
            k: tensors[key] for k in self.module.state_dict() if (key := f"{self.site.path}.{k}") in tensors
        }
        meta = any(p.is_meta for p in self.module.parameters())
        self.module.load_state_dict(own, strict=False, assign=meta)

    def ready(self, adapter: str, *, widen: bool, trainable: bool) -> Callable[[], None]:
        """The call that gives the copy to its wrapper and puts that in its place."""
        return partial(self._put, adapter)

    def _put(self, adapter: str) -> None:
        self.wrapper.add_copy(adapter, self.module)
        if self.site.module is not self.wrapper:
            self.site.replace(self.wrapper)


@dataclass
class Rows:
    """The rows of one embedding whose tokens will be trained, or of a head that follows one."""

    site: Site
    layer: TrainableTokens
    indices: list[int]
    rows: Tensor

    @property
    def key(self) -> str:
        return f"{self.site.path}.token_adapter.trainable_tokens_delta"

    @property
    def own(self) -> bool:
        return self.layer.tied_adapter is None

    def keys(self) -> dict[str, tuple[int, ...]]:
        return {self.key: tuple(self.rows.shape)} if self.own else {}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.rows = tensors.get(self.key, self.rows)

    def ready(self, adapter: str, *, widen: bool, trainable: bool) -> Callable[[], None]:
        """Make the parameter, in the base's type or wider; the returned call puts it in its place."""
        base = self.layer.get_base_layer()
        device, dtype = backends.find(base).device(base), self.layer.base_dtype()
        if widen and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        rows = self.layer.prepared(self.indices, self.rows.to(device=device, dtype=dtype))
        return partial(self._put, adapter, rows)

    def _put(self, adapter: str, rows: PreparedRows) -> None:
        self.layer.put_rows(adapter, rows)
        if self.site.module is not self.layer:
            self.site.replace(self.layer)


@dataclass
class Injection:
    """An adapter that is ready to be put into a model.

    Attributes:
        model: The model; unchanged until `commit`.
        config: The caller's configuration, copied and completed.
        adapter: The adapter's name.
        additions: Layers with their future factors.
        copies: Modules with their future copies.
        tokens: Embeddings with their future rows.
        change: What becomes of the model's layers before anything is adapted.
        widen: Keep the parameters beside 16-bit weights in float32.
    """

    model: nn.Module
    config: LoraConfig
    adapter: str
    additions: list[Addition]
    copies: list[Copy]
    tokens: list[Rows]
    change: Replication | None
    widen: bool
    _filled: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> list[Addition | Copy | Rows]:
        return [*self.additions, *self.copies, *self.tokens]

    @property
    def targets(self) -> dict[str, LoraLayer]:
        return {addition.path: addition.layer for addition in self.additions}

    def initialise(self, seed: int, meta: bool = False) -> None:
        """Compute the starting factors of every layer.

        Args:
            seed: The adapter's draw.
            meta: Give shapes without values (``low_cpu_mem_usage``): they will be loaded.

        Raises:
            ConfigError: If the initialisation starts from data, and nothing was measured.
        """
        for addition in self.additions:
            addition.initialise(seed, meta=meta)

    # --- values from a file

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names on disk (without any prefix) of every tensor of the adapter, with their shapes."""
        result = {name: shape for part in self.parts for name, shape in part.keys().items()}
        return {**result, **{name: tuple(parameter.shape) for name, parameter in self.biases()}}

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Names on disk of base tensors that a file may carry along: input and output embeddings."""
        return {name: tuple(p.shape) for name, p in self._embeddings().items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take all values from tensors with the names of `expected`; the base is not touched yet.

        Raises:
            LoadMismatchError: If two modules are to be tied whose values differ.
        """
        self._check_tied(tensors)
        for part in self.parts:
            part.fill(tensors)
        self._filled = dict(tensors)

    def changed_embeddings(self) -> list[str]:
        """Names of base embeddings that the file would replace by other values."""
        return [
            name
            for name in self._embeddings()
            if name in self._filled and differs_from_base(self.model, name, self._filled[name])
        ]

    def biases(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base biases that the adapter trains, by their name on disk (without prefix)."""
        copied = [trained.site.path for trained in self.copies]
        return bias_parameters(self.model, self.config.bias, self.adapter, self.targets, copied)

    def _embeddings(self) -> dict[str, nn.Parameter]:
        """Base embeddings, less those of which the adapter gets a copy of its own."""
        wrapped = dict.fromkeys(self.targets, "base_layer")
        wrapped |= dict.fromkeys((rows.site.path for rows in self.tokens), "token_adapter.base_layer")
        own = tuple(f"{trained.site.path}." for trained in self.copies)
        weights = embedding_weights(self.model, wrapped)
        return {name: weight for name, weight in weights.items() if not name.startswith(own)}

    def _check_tied(self, tensors: Mapping[str, Tensor]) -> None:
        pairs = [
            (f"{trained.site.path}.weight", f"{trained.follows.site.path}.weight", False)
            for trained in self.copies
            if trained.follows is not None
        ]
        paths = {id(addition.layer): addition.path for addition in self.additions}
        for addition in self.additions:
            if (lead := addition.layer.tied_adapter) is None:
                continue
            if addition.layer.lookup:
                names = [f"lora_embedding_{factor}" for factor in "AB"]
                pairs += [(f"{addition.path}.{n}", f"{paths[id(lead)]}.{n}", False) for n in names]
            else:
                for own, other in zip("AB", "BA", strict=True):
                    key = f"{paths[id(lead)]}.lora_embedding_{other}"
                    pairs.append((f"{addition.path}.lora_{own}.weight", key, True))
        for key, other, transposed in pairs:
            if key not in tensors or other not in tensors:
                continue
            if not torch.equal(tensors[key], tensors[other].T if transposed else tensors[other]):
                raise LoadMismatchError(
                    f"ensure_weight_tying is set, but {key} and {other} differ: training did not tie them "
                    "(the peft library parts them in 16 bits). Load it untied: in adapter_config.json set "
                    '"ensure_weight_tying" to false, and name both modules'
                )

    # --- into the model

    def commit(self, *, active: list[str] | None = None, trainable: bool = True) -> None:
        """Put everything in its place; where that fails, the model is as it was.

        Args:
            active: Adapters that are active afterwards; None activates this one.
            trainable: Whether the activated parameters require gradients, and the adapter's dropout acts. The
                base's own mode stays.
        """
        # What may fail, for want of memory: every tensor is made before anything is put in.
        puts = [part.ready(self.adapter, widen=self.widen, trainable=trainable) for part in self.parts]
        biases = dict(self.biases())
        puts += self._base_writes(biases)
        present = AdapterSet(self.model).modules()
        first = not any(module.held_adapters for module in present)
        disabled = bool(present) and all(module._disabled for module in present)
        if first:
            backends.prepare_backward(self.model)

        # From here on modules are swapped and flags are set, and no tensor is made.
        if self.change is not None:
            keep(self.model, self.change)
        if first:
            # The first adapter freezes the base; what trains beside an adapter later on is meant to.
            own = set(map(id, biases.values()))
            for parameter in self.model.parameters():
                if id(parameter) not in own:
                    parameter.requires_grad_(False)
        for put in puts:
            put()
        keep_out_of_fused_kernels(self.model)
        index = AdapterSet(self.model)
        if active is None:
            index.activate([self.adapter], inference_mode=not trainable)
        else:
            known = {id(module) for module in present}
            for module in index.modules():
                if id(module) not in known:
                    module.note_active(active)
        if disabled:
            index.enable(False)
        if trainable and (active is None or self.adapter in active):
            for parameter in biases.values():
                parameter.requires_grad_(True)

    def _base_writes(self, biases: Mapping[str, nn.Parameter]) -> list[Callable[[], None]]:
        """Calls that give base tensors the values that the adapter's file has."""
        names = [name for name in (*biases, *self._embeddings()) if name in self._filled]
        writes = [writing_base_tensor(self.model, name, self._filled[name]) for name in names]
        return [write for write in writes if write is not None]
