"""An adapter that is ready to be put into a model, and the step that puts it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from veneer import backends
from veneer.adapters import AdapterModule, AdapterSet
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
from veneer.inject.tokens import Rows
from veneer.layers import LoraLayer
from veneer.layers.layer import Prepared
from veneer.layers.making import factor_dtype
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.start import initialise, start_from, tensor_shapes
from veneer.layers.trainable_tokens import PreparedRows
from veneer.spec import LoraSpec
from veneer.targets import Plan


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
        """Names on disk of its tensors, below the module's path, and their shapes."""
        return tensor_shapes(self.layer, self.spec)

    def keys(self) -> dict[str, tuple[int, ...]]:
        """The same with the module's path."""
        return {f"{self.path}.{name}": shape for name, shape in self.shapes.items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values from tensors with the names of `keys`, as far as they are there."""
        own = {name: tensors[key] for name in self.shapes if (key := f"{self.path}.{name}") in tensors}
        self.start = start_from(self.layer, self.spec, own, self.shapes)


@dataclass
class Copy:
    """One module that will be trained whole; one that follows another will share its weight."""

    site: Site
    wrapper: ModulesToSaveWrapper
    module: nn.Module
    follows: Copy | None = None


@dataclass(frozen=True)
class _Prepared:
    """What `Injection.commit` puts in: each layer's part, rows, and how base tensors get other values.

    Attributes:
        layers: One for each addition.
        rows: One for each embedding whose tokens are trained.
        biases: The base biases that the adapter trains.
        writes: Calls that give base tensors the values that the adapter's file has.
        modules: The modules with adapters that the model has already.
        first: Whether none of these holds an adapter.
    """

    layers: list[Prepared]
    rows: list[PreparedRows]
    biases: list[nn.Parameter]
    writes: list[Callable[[], None]]
    modules: list[AdapterModule]
    first: bool


@dataclass
class Injection:
    """An adapter that is ready to be put into a model.

    Attributes:
        model: The model; unchanged until `commit`.
        config: The caller's configuration, copied and completed.
        plan: What matched and what did not.
        additions: Layers with their future factors.
        copies: Modules with their future copies.
        tokens: Embeddings with their future rows.
        change: What becomes of the model's layers before anything is adapted.
    """

    model: nn.Module
    config: LoraConfig
    adapter: str
    plan: Plan
    additions: list[Addition]
    copies: list[Copy]
    tokens: list[Rows] = field(default_factory=list)
    change: Replication | None = None
    autocast_adapter_dtype: bool = True
    _places: dict[str, Tensor] = field(default_factory=dict)

    def initialise(self, seed: int, meta: bool = False) -> None:
        """Compute the starting factors of every layer.

        Args:
            seed: The adapter's draw.
            meta: Give shapes without values (``low_cpu_mem_usage``): they will be loaded.

        Raises:
            ConfigError: If the initialisation starts from data, and nothing was measured.
        """
        for addition in self.additions:
            if meta or _is_meta(addition.layer):
                addition.fill({k: torch.empty(s, device="meta") for k, s in addition.keys().items()})
            else:
                addition.start = initialise(addition.layer, addition.spec, seed)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names on disk (without any prefix) of every tensor of the adapter, with their shapes."""
        result: dict[str, tuple[int, ...]] = {}
        for addition in self.additions:
            result.update(addition.keys())
        for trained in self.copies:
            for name, tensor in trained.module.state_dict().items():
                result[f"{trained.site.path}.{name}"] = tuple(tensor.shape)
        for token in self.tokens:
            if token.own:
                result[token.key] = tuple(token.rows.shape)
        for name, parameter in self.biases():
            result[name] = tuple(parameter.shape)
        return result

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Names on disk of base tensors that a file may carry along: input and output embeddings."""
        return {name: tuple(p.shape) for name, p in self._embeddings().items()}

    def _embeddings(self) -> dict[str, nn.Parameter]:
        """Base embeddings, less those of which the adapter gets a copy of its own."""
        own = tuple(f"{trained.site.path}." for trained in self.copies)
        weights = embedding_weights(self.model, self._wrapped())
        return {name: weight for name, weight in weights.items() if not name.startswith(own)}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take all values from tensors with the names of `expected`; the base is not touched yet.

        Raises:
            LoadMismatchError: If two modules are to be tied whose values differ.
        """
        self._check_tied(tensors)
        for addition in self.additions:
            addition.fill(tensors)
        for trained in self.copies:
            prefix = f"{trained.site.path}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            own = {k: v for k, v in own.items() if k in trained.module.state_dict()}
            trained.module.load_state_dict(own, strict=False, assign=_has_meta(trained.module))
        for token in self.tokens:
            token.rows = tensors.get(token.key, token.rows)
        self._places = dict(tensors)

    def _check_tied(self, tensors: Mapping[str, Tensor]) -> None:
        pairs = [
            (f"{trained.site.path}.weight", f"{trained.follows.site.path}.weight", False)
            for trained in self.copies
            if trained.follows is not None
        ]
        paths = {id(addition.layer): addition.path for addition in self.additions}
        for addition in self.additions:
            if (lead := addition.layer.tied_adapter) is not None:
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

    def biases(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base biases that the adapter trains, by their name on disk (without prefix)."""
        copied = [trained.site.path for trained in self.copies]
        return bias_parameters(self.model, self.config.bias, self.adapter, self._targets(), copied)

    def _wrapped(self) -> dict[str, str]:
        """Paths of modules that will be wrapped, with where each will lie in its wrapper."""
        rows = {t.site.path: "token_adapter.base_layer" for t in self.tokens}
        return {**dict.fromkeys(self._targets(), "base_layer"), **rows}

    def _targets(self) -> dict[str, LoraLayer]:
        return {addition.path: addition.layer for addition in self.additions}

    def commit(self, *, active: list[str] | None = None, trainable: bool = True) -> None:
        """Put everything in its place; where that fails, the model is as it was.

        Args:
            active: Adapters that are active afterwards; None activates this one.
            trainable: Whether the activated parameters require gradients, and the adapter's dropout acts. The
                base's own mode stays.
        """
        self._put(self._prepared(trainable), active, trainable)

    def _prepared(self, trainable: bool) -> _Prepared:
        """All tensors, made and where they belong: what may fail for want of memory."""
        layers = []
        for addition in self.additions:
            start, addition.start = addition.start, None  # what has been copied need not be kept
            assert start is not None
            dtype = factor_dtype(addition.layer, self.autocast_adapter_dtype)
            layers.append(addition.layer.prepared(addition.spec, start, dtype=dtype, training=trainable))
        rows = [token.prepared(widen=self.autocast_adapter_dtype) for token in self.tokens]
        biases = dict(self.biases())
        writes = [
            writing_base_tensor(self.model, name, self._places[name])
            for name in (*biases, *self._embeddings())
            if name in self._places
        ]
        modules = AdapterSet(self.model).modules()
        first = not any(m.held_adapters for m in modules)
        if first:
            backends.settle(self.model)
        return _Prepared(layers, rows, list(biases.values()), [w for w in writes if w], modules, first)

    def _put(self, made: _Prepared, active: list[str] | None, trainable: bool) -> None:
        """Put what was made in its place. No tensor is made here: it only swaps modules and sets flags."""
        if self.change is not None:
            keep(self.model, self.change)
        disabled = bool(made.modules) and all(m._disabled for m in made.modules)
        if made.first:
            # The first adapter freezes the base; what trains beside an adapter later on is meant to.
            own = set(map(id, made.biases))
            for parameter in self.model.parameters():
                if id(parameter) not in own:
                    parameter.requires_grad_(False)
        for addition, adapter in zip(self.additions, made.layers, strict=True):
            addition.layer.put_adapter(adapter)
            if addition.new:
                addition.site.replace(addition.layer)
            forget_statistics(addition.layer.get_base_layer())
        for trained in self.copies:
            trained.wrapper.add_copy(self.adapter, trained.module)
            if trained.site.module is not trained.wrapper:
                trained.site.replace(trained.wrapper)
        for token, rows in zip(self.tokens, made.rows, strict=True):
            token.put(self.adapter, rows)
        for write in made.writes:
            write()
        keep_out_of_fused_kernels(self.model)
        index = AdapterSet(self.model)
        if active is None:
            index.activate([self.adapter], inference_mode=not trainable)
        else:
            known = {id(m) for m in made.modules}
            for module in index.modules():
                if id(module) not in known:
                    module.note_active(active)
        if disabled:
            index.enable(False)
        if trainable and (active is None or self.adapter in active):
            for parameter in made.biases:
                parameter.requires_grad_(True)

    def changed_embeddings(self) -> list[str]:
        """Names of base embeddings that the file would replace by other values."""
        return [
            name
            for name in self._embeddings()
            if name in self._places and differs_from_base(self.model, name, self._places[name])
        ]


def _is_meta(layer: LoraLayer) -> bool:
    return layer.base_device().type == "meta"


def _has_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())
