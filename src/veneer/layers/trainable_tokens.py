"""Rows of an embedding that an adapter trains (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Reversible, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer import backends
from veneer.adapters import as_names
from veneer.errors import AdapterNameError
from veneer.layers.factor import stand_in
from veneer.merge import Mergeable
from veneer.ops.mixed_batch import along_rows, own_rows
from veneer.rollback import Rows
from veneer.routing import call_by_rows, current
from veneer.sharded import is_distributed


class TokenRows(nn.Module):
    """The base and each adapter's rows, under PEFT's names.

    Args:
        base_layer: The embedding, or a head that shares its weight.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()


class TokenIndex(nn.Module):
    """The tokens of an adapter, which move with the module to another device and are not saved.

    Args:
        index: The tokens, (n,).
    """

    index: Tensor
    ordered: Tensor
    order: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        ordered, order = index.sort()
        for name, tensor in (("index", index), ("ordered", ordered), ("order", order)):
            self.register_buffer(name, tensor, persistent=False)


class PreparedRows(NamedTuple):
    """An adapter's rows of one embedding, ready to be stored.

    Attributes:
        indices: The tokens.
        index: The same as a tensor.
        delta: D; None for a head that shares the embedding's weight.
    """

    indices: list[int]
    index: TokenIndex
    delta: nn.Parameter | None


class TrainableTokens(Mergeable):
    """An embedding of which adapters replace some rows: ``y = D[k]`` where ``x = i_k``, else ``W[x]``.

    D (n, dim) contains the new rows themselves, not differences. In a head that shares the embedding's
    weight, the outputs at the indices are ``x Dᵀ``. Neither copies W. Several adapters may be active if their
    indices are disjoint.

    Shapes: embedding x: (...) integer -> (..., dim); head x: (..., dim) -> (..., vocab).

    Args:
        base_layer: The embedding or the head.
        tied_to: For a head that shares the embedding's weight: the embedding's wrapper.
    """

    def __init__(self, base_layer: nn.Module, tied_to: TrainableTokens | None = None) -> None:
        super().__init__()
        self.token_adapter = TokenRows(base_layer)
        if tied_to is not None:
            self.token_adapter.trainable_tokens_delta = tied_to.token_adapter.trainable_tokens_delta
        self.training = base_layer.training
        self.token_indices: dict[str, list[int]] = {}
        self._index = nn.ModuleDict()
        # In a list: a module as an attribute would be registered, and saved twice.
        self._tied_to = [] if tied_to is None else [tied_to]

    @classmethod
    def refuses(cls, base: nn.Module, indices: Sequence[int]) -> str | None:
        """Why rows of this module cannot be trained, or None."""
        weight = getattr(base, "weight", None)
        if not isinstance(base, nn.Embedding | nn.Linear) or not isinstance(weight, Tensor):
            return "only an embedding, or a linear head, has rows for tokens"
        if not weight.is_floating_point():
            return f"its weight is stored as {weight.dtype}"
        if not (backend := backends.find(base)).readable:
            return f"its rows cannot be read: they are stored as {backend.quantization}"
        if isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward:
            return "it has a forward of its own"
        if getattr(base, "max_norm", None) is not None:
            return "its max_norm renormalises rows, which would change what is trained"
        wrong = [i for i in indices if not 0 <= i < weight.shape[0]]
        if wrong:
            return (
                f"the token indices {wrong[:5]} are not among its {weight.shape[0]} rows: for new tokens "
                "call model.resize_token_embeddings first"
            )
        return "the same token index is named twice" if len(set(indices)) < len(indices) else None

    # -- what it holds ---------------------------------------------------------------------------

    @property
    def tied_adapter(self) -> TrainableTokens | None:
        return self._tied_to[0] if self._tied_to else None

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.base_layer

    def get_base_layer(self) -> nn.Module:
        return self.token_adapter.base_layer

    @property
    def held_adapters(self) -> tuple[str, ...]:
        return tuple(self.token_indices)

    def rows(self, name: str) -> Tensor:
        rows: Tensor = self.token_adapter.trainable_tokens_delta[name]
        return rows

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        if self.tied_adapter is None:
            yield self.token_adapter.trainable_tokens_delta[name]

    def inner(self) -> Reversible[tuple[str, nn.Module | None]]:
        return (("token_adapter.base_layer", self.get_base_layer()),)

    def base_dtype(self) -> torch.dtype:
        return self.backend.dtype(self.get_base_layer())

    def start(self, indices: Sequence[int]) -> Tensor:
        """The base's rows at the indices."""
        base = self.get_base_layer()
        weight = backends.find(base).read(base)
        return weight[torch.tensor(indices, device=weight.device)].clone()

    def prepared(self, indices: Sequence[int], rows: Tensor) -> PreparedRows:
        """An adapter's rows, ready to be stored by `put_rows`; nothing is stored here."""
        index = torch.tensor(indices, device=rows.device)
        delta = None
        if self.tied_adapter is None:
            delta = nn.Parameter(rows.detach().clone(), requires_grad=False)
        return PreparedRows(list(indices), TokenIndex(index), delta)

    def put_rows(self, name: str, rows: PreparedRows) -> None:
        """Store what `prepared` returned. No tensor is created, so it cannot run out of memory."""
        self.token_indices[name], self._index[name] = rows.indices, rows.index
        if rows.delta is not None:
            self.token_adapter.trainable_tokens_delta[name] = rows.delta
        self.adapters_changed()

    def drop_adapter(self, name: str) -> None:
        self.unmerge([name])
        del self.token_indices[name], self._index[name]
        if self.tied_adapter is None:
            del self.token_adapter.trainable_tokens_delta[name]

    def move_adapter(self, old: str, new: str) -> None:
        containers: list[Any] = [self._index]
        if self.tied_adapter is None:
            containers.append(self.token_adapter.trainable_tokens_delta)
        for container in containers:
            container[new] = container[old]
            del container[old]
        self.token_indices[new] = self.token_indices.pop(old)
        self.rename_merged(old, new)

    def copying(self, old: str, new: str) -> Callable[[], None]:
        return partial(self.put_rows, new, self.prepared(self.token_indices[old], self.rows(old)))

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The names on disk and in memory of an adapter's tensors; transformers calls this."""
        if self.tied_adapter is not None or adapter_name not in self.token_indices:
            return {}
        name = "token_adapter.trainable_tokens_delta"
        return {name: f"{name}.{adapter_name}"}

    def refuses_active(self, names: Sequence[str]) -> str | None:
        seen: dict[int, str] = {}
        for name in names:
            for index in self.token_indices.get(name, ()):
                if index in seen:
                    return (
                        f"the adapters {seen[index]!r} and {name!r} both train the row of token {index}; "
                        "only one of them can count"
                    )
                seen[index] = name
        return None

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; a merged one that is not among them is unmerged.

        Raises:
            AdapterNameError: If two of them train the same row.
        """
        names = as_names(adapter_names)
        if (reason := self.refuses_active(names)) is not None:
            raise AdapterNameError(reason)
        if left := [name for name in self.merged_adapters if name not in names]:
            self.unmerge(left)
        super().set_adapter(names, inference_mode=inference_mode)

    # -- forward -----------------------------------------------------------------------------------

    @property
    def _live(self) -> list[str]:
        merged = self.merged_adapters
        names = () if self.disable_adapters else self._active
        return [name for name in names if name in self.token_indices and name not in merged]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output with the rows of the active adapters."""
        if "adapter_names" in kwargs:
            return call_by_rows(self, kwargs.pop("adapter_names"), x, *args, **kwargs)  # type: ignore[no-any-return]
        routing = current(self)
        base = self.get_base_layer() if routing is None and not self._disabled else self.original_base()
        result: Tensor = base(x, *args, **kwargs)
        if routing is None:
            for name in self._live:
                result = self._placed(name, x, result)
            return result
        if self._disabled or not routing.count:
            return result
        if torch.compiler.is_compiling():  # only values may depend on the names
            for name, mine in routing.slots(self.held_adapters, x, lambda: "the embedding"):
                own = self._placed(name, own_rows(x, mine), own_rows(result, mine))
                result = torch.where(along_rows(mine, result), own, result)
            return result
        if not routing.concerns(self.token_indices):
            return result
        names = routing.rows(x.shape[0], self.held_adapters, lambda: "the embedding")
        parts = [
            result[rows] if own is None else self._placed(own, x[rows], result[rows])
            for own, rows in routing.indices(names, x.device).items()
        ]
        back = routing.back(names, x.device)
        return torch.cat(parts) if back is None else torch.cat(parts)[back]

    def _placed(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """``result`` with the rows of one adapter."""
        base: Any = self.get_base_layer()
        index: Any = self._index[name]
        rows = self.rows(name)
        if isinstance(base, nn.Linear):
            bias = None if base.bias is None else base.bias[index.index]
            return result.index_copy(-1, index.index, F.linear(x, rows.to(x), bias).to(result))
        ordered, order = index.ordered, index.order
        place = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
        hit = ordered[place] == x
        padding = base.padding_idx
        if padding is not None:
            padding = self.token_indices[name].index(padding) if padding in self.token_indices[name] else None
        changes = {"num_embeddings": len(rows), "padding_idx": padding, "sparse": False}
        own = stand_in(base, {"weight": rows.to(base.weight.dtype)}, changes)
        # Not by calling the module: its hooks have run for this input already.
        return torch.where(hit.unsqueeze(-1), type(base).forward(own, order[place]).to(result), result)

    @property
    def weight(self) -> Tensor:
        """The effective weight, for code that reads it: the base's, or a copy with the adapters' rows."""
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        for name in self._live:
            index: Tensor = self._index[name].index  # type: ignore[assignment]
            weight = weight.index_copy(0, index, self.rows(name).to(weight))
        return weight

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                inner = self.__dict__.get("_modules", {}).get("token_adapter")
                if inner is None or name.startswith("_"):
                    raise
                return getattr(inner.base_layer, name)

    # -- merging: see `veneer.merge` -----------------------------------------------------------------

    def original_base(self) -> nn.Module:
        base, undo = self.get_base_layer(), self._owner._undo
        if undo is None:
            return base
        weight, kept = backends.find(base).read(base), undo.tensors()
        return stand_in(base, {"weight": weight.index_copy(0, kept["places"], kept["rows"])})

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        """Reasons against merging these adapters in any storage; empty if there are none."""
        if is_distributed(self.get_base_layer().weight):
            return ["its weight is sharded, and a row is in one piece of it: merge where the base is whole"]
        reason = self.refuses_active([*self.merged_adapters, *names])
        return [] if reason is None else [reason]

    def update_of(self, name: str) -> Rows:
        index: Tensor = self._index[name].index  # type: ignore[assignment]
        return Rows(index, self.rows(name).detach())


def indices_by_module(
    given: Sequence[int] | Mapping[str, Sequence[int]], default: str
) -> dict[str, list[int]]:
    """``trainable_token_indices`` by the name of the module; a plain list is for the input embedding."""
    named = given.items() if isinstance(given, Mapping) else [(default, given)]
    return {name: list(indices) for name, indices in named}
