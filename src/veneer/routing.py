"""What one call asks of a model's adapters: one for each row of the batch, or none while they are disabled.

A `Routing` belongs to one forward, or to one `generate`, and to the thread that makes it: layers find it
while the call runs. Contexts in which a thread has adapters disabled belong to that thread in the same way.
Neither is state of a module.

Neither outlives the call, with one exception: gradient checkpointing runs a part of the forward once more in
the backward, perhaps in another thread. transformers' checkpointing hands on what the call asked for. Under
any other checkpointing the second run would silently use the active adapters, so it is refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import AdapterModule, Contexts, adapter_modules, opened
from veneer.errors import RoutingError
from veneer.ops.mixed_batch import Layout, layouts

#: The name that stands for the base model without an adapter.
BASE = "__base__"


@dataclass(frozen=True)
class Activation:
    """From where on invoked adapters act, in each row of a batch.

    Args:
        offsets: For each adapter and row: the number of positions, counted from the end of the input, on
            which it acts; None for none.
        length: Positions of the input; 0 where it is not known, so that offsets count from the end.
        grows: Whether positions may follow the input (`generate`).
    """

    offsets: Mapping[str, Sequence[int | None]]
    length: int = 0
    grows: bool = False

    def starts(self, name: str, rows: Sequence[int], tokens: int, where: str) -> list[int]:
        """The first position on which an adapter acts, in rows of a layer's input of so many positions.

        Raises:
            RoutingError: The positions are not those of the input.
        """
        beyond = tokens - self.length if self.length and tokens > self.length else 0
        if beyond and not self.grows:
            raise RoutingError(
                f"the input of the model has {self.length} positions and that of {where} {tokens}: from "
                f"which of them on {name!r} acts is unknown. Pass alora_offsets, counted from the end"
            )
        counts = [self.offsets[name][row] for row in rows]
        return [tokens if count is None else max(tokens - beyond - count, 0) for count in counts]


class Routing:
    """The adapter of each row of a batch.

    Args:
        names: One for each row; `BASE` for none.
        expand: How many neighbouring rows of a layer's input one row may have become (beams, samples).
        activation: From where on adapters act that are invoked.
        adapters: All that rows of such batches may go through: a compiled layer computes with each of them,
            so that which of them a batch has changes nothing but values. None means those of this batch.
        device: Where the layers are.
    """

    def __init__(
        self,
        names: Sequence[str],
        expand: int = 1,
        activation: Activation | None = None,
        adapters: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.names = tuple(names)
        #: The adapters of the batch, without the base, in order of appearance.
        self.used = tuple(dict.fromkeys(name for name in self.names if name != BASE))
        #: Of the names; a compiler that asked for the names would compile once for each of them.
        self.count = len(self.names)
        #: Whether each row is an adapter's, by adapter: (rows,) of bool.
        self.mine: dict[str, Tensor] = {}
        if self.names:
            slots = tuple(adapters) or self.used
            whose = [[owner == name for name in self.names] for owner in slots]
            rows = torch.tensor(whose, dtype=torch.bool, device=device)
            self.mine = dict(zip(slots, rows, strict=True))
        self.activation = activation
        self.expand = expand
        #: Layers that ran inside a checkpoint that does not know of this routing.
        self.recomputed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._rows: dict[Any, Any] = {}
        #: What layers computed for this call, by layer; they are held, so a key cannot be taken again.
        self.memo: dict[nn.Module, Any] = {}

    def concerns(self, held: Container[str]) -> bool:
        """Whether any adapter of the batch is among these."""
        return any(name in held for name in self.used)

    def rows(self, count: int, held: tuple[str, ...], where: Callable[[], str]) -> tuple[str | None, ...]:
        """The adapter of each row of a layer's input, None where the layer has none for it.

        Args:
            count: Rows of the layer's input.
            held: The adapters that the layer holds.
            where: Gives what to call the layer in an error.

        Raises:
            RoutingError: The rows are not those of the batch.
        """
        key = (count, held)
        if key not in self._rows:
            times = self._times(count, where)
            mine = [name if name in held else None for name in self.names]
            self._rows[key] = tuple(name for name in mine for _ in range(times))
        found: tuple[str | None, ...] = self._rows[key]
        return found

    def _times(self, count: int, where: Callable[[], str]) -> int:
        """How many rows of a layer's input each row of the batch has become."""
        times, rest = count // self.count, count % self.count  # no divmod, which compilers do not know
        if rest or times not in (1, self.expand):
            raise RoutingError(
                f"adapter_names has {self.count} names, but the input of {where()} has {count} rows: "
                "which adapter each belongs to is unknown. Pass one name for each row of the batch; a "
                "model that lays the rows of a batch together inside cannot mix adapters in one batch"
            )
        return times

    def slots(self, held: Sequence[str], x: Tensor, where: Callable[[], str]) -> Iterator[tuple[str, Tensor]]:
        """Whether each row of a layer's input is an adapter's, for all adapters that it holds.

        Nothing but the values of these tensors depends on the names: compilers see it.

        Args:
            held: The adapters that the layer holds.
            x: (rows, ...), the layer's input.
            where: Gives what to call the layer in an error.
        """
        times = self._times(x.shape[0] if x.dim() else 0, where)
        for name in held:
            if name in self.mine:
                mine = self.mine[name].to(x.device)
                yield name, mine if times == 1 else mine.repeat_interleave(times)

    def layouts(self, names: tuple[str | None, ...]) -> list[Layout]:
        """`veneer.ops.mixed_batch.layouts`, computed once."""
        if names not in self._rows:
            self._rows[names] = layouts(names)
        found: list[Layout] = self._rows[names]
        return found

    def order(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers of rows as an index tensor."""
        key = (rows, device)
        if key not in self._rows:
            self._rows[key] = torch.tensor(rows, device=device)
        found: Tensor = self._rows[key]
        return found

    def indices(self, names: tuple[str | None, ...], device: torch.device) -> dict[str | None, Tensor]:
        """The places of each adapter's rows, as index tensors."""
        key = (names, device)
        if key not in self._rows:
            self._rows[key] = {
                name: torch.tensor([i for i, n in enumerate(names) if n == name], device=device)
                for name in dict.fromkeys(names)
            }
        found: dict[str | None, Tensor] = self._rows[key]
        return found

    def note(self, layer: nn.Module) -> None:
        """Remember a layer that a checkpoint will run again without this routing."""
        if torch.compiler.is_compiling() or _here.carried:
            return
        saved: object = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if saved is not None or (self.with_grad and not torch.is_grad_enabled()):
            self.recomputed.add(layer)

    with_grad = False


class _Here(threading.local):
    """What the thread's present call asks for. Compilers guard on the attributes."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        #: The checkpoint around it can run again with the same.
        self.carried = False


_here = _Here()
#: Around what threads share: `_alive`, and the checkpointing functions of a model. A collected generator may
#: close its context anywhere, so it is one that its holder can take again.
_lock = threading.RLock()
_alive: weakref.WeakSet[Routing] = weakref.WeakSet()
#: What layers get whose adapters are disabled in this thread: no row goes through any.
_NO_ROWS = Routing(())


def current(layer: AdapterModule) -> Routing | None:
    """The routing of the call that runs, for a layer that is being called; None if active adapters act.

    While this thread has the layer's adapters disabled, it is one in which no row has an adapter.

    Raises:
        RoutingError: The layer is called by a recomputation in a backward, whose routing is gone.
    """
    routing, contexts = _here.routing, layer._contexts
    if routing is not None:
        routing.note(layer)
    if contexts.open and contexts.hold():
        return _NO_ROWS
    if routing is not None:
        return routing if routing.count else None
    # In a backward, of which compilers know nothing; this is asked at every call of every layer.
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        _refuse_recomputation(layer)
    return None


def acting(layer: nn.Module, name: str, where: str, x: Tensor) -> Tensor:
    """Where the call that runs lets an adapter act. x: (rows, tokens, in) or (rows, in) -> (...) of bool.

    Args:
        layer: The layer that is being called.
        name: The adapter.
        where: What to call the layer in an error.
        x: The layer's input, or those of its rows that the adapter is for.

    Raises:
        RoutingError: The call does not say, or not for rows like these.
    """
    routing = _here.routing
    activation = None if routing is None else routing.activation
    if routing is None or activation is None:
        raise RoutingError(
            f"{name!r} is an aLoRA: it acts from its invocation tokens on, and this call of {where} does not "
            "say where they are. Call the PeftModel that holds it, with input_ids or alora_offsets; a part "
            "of the model that is computed again in a backward needs transformers' own checkpointing"
        )
    if name not in activation.offsets:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    count = len(activation.offsets[name])
    # A compiled layer gives every row to every adapter, and keeps what is the row's own.
    every = not routing.names or torch.compiler.is_compiling()
    mine = [row for row in range(count) if every or routing.names[row] == name]
    tokens = x.shape[1] if x.dim() == 3 else 1
    times, rest = x.shape[0] // max(1, len(mine)), x.shape[0] % max(1, len(mine))
    if x.dim() not in (2, 3) or rest or times not in (1, routing.expand):
        raise RoutingError(
            f"the batch has {len(mine)} rows for the aLoRA {name!r}, and the input of {where} is "
            f"{tuple(x.shape)}: from which position on it acts is unknown"
        )
    rows = [row for row in mine for _ in range(times)]
    starts = torch.tensor(activation.starts(name, rows, tokens, where), device=x.device)
    mask = torch.arange(tokens, device=x.device) >= starts.unsqueeze(1)
    return mask if x.dim() == 3 else mask[:, 0]


def last_invocations(input_ids: Tensor, tokens: Sequence[int]) -> list[int | None]:
    """Positions from the start of the last occurrence of ``tokens`` to the end, by row; None without one.

    input_ids: (rows, length) or (length,).
    """
    ids = input_ids.reshape(-1, input_ids.shape[-1]).cpu()
    length, size = ids.shape[1], len(tokens)
    if length < size:
        return [None] * ids.shape[0]
    hits = (ids.unfold(1, size, 1) == torch.tensor(list(tokens))).all(-1)
    return [length - int(row.nonzero()[-1]) if bool(row.any()) else None for row in hits]


def _refuse_recomputation(layer: nn.Module) -> None:
    if not _alive:
        return
    with _lock:
        known = any(layer in routing.recomputed for routing in _alive)
    if known:
        raise RoutingError(
            "a part of the model is computed again in the backward (gradient checkpointing), and its call "
            "named adapters for rows or had them disabled, which is not known any more. With adapter_names "
            "and under disable_adapter use the model's own checkpointing (gradient_checkpointing_enable of "
            "a transformers model), or none"
        )


@contextmanager
def routed(
    model: nn.Module,
    names: Sequence[str],
    expand: int = 1,
    activation: Activation | None = None,
    adapters: Sequence[str] = (),
) -> Iterator[Routing]:
    """A context in which the rows of a batch go through the adapters named.

    Args:
        model: The model that is called inside.
        names: One for each row.
        expand: See `Routing`.
        activation: See `Routing`.
        adapters: See `Routing`.
    """
    first = next(model.parameters(), None)
    device = "cpu" if first is None or first.is_meta else first.device
    routing = Routing(names, expand, activation, adapters, device)
    routing.with_grad = torch.is_grad_enabled()
    # Without a graph nothing is computed again.
    carried = _checkpoints_carry(model) if routing.with_grad else nullcontext()
    with carried, _as_current(routing):
        yield routing


@contextmanager
def disabled(model: nn.Module, *more: Contexts) -> Iterator[None]:
    """A context in which a model computes what its base computes, for the thread that opens it.

    Args:
        model: The model.
        *more: Those of adapter modules that will come into the model meanwhile.
    """
    everywhere = dict.fromkeys((*more, *(module._contexts for module in adapter_modules(model))))
    with _checkpoints_carry(model), opened(everywhere):
        yield


@contextmanager
def _as_current(routing: Routing | None, carried: bool = False) -> Iterator[None]:
    before = _here.routing, _here.carried
    _here.routing, _here.carried = routing, carried
    try:
        yield
    finally:
        _here.routing, _here.carried = before


def keep_for_backward(output: Any, routing: Routing) -> None:
    """Let the routing live as long as the graph of an output, so that a recomputation is recognised."""
    routing.memo.clear()
    if not routing.recomputed:
        return
    for tensor in _tensors(output):
        if tensor.grad_fn is not None:
            kept: dict[str, object] = tensor.grad_fn.metadata  # type: ignore[assignment]
            kept["veneer.routing"] = routing
            with _lock:
                _alive.add(routing)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


class _Carried:
    """A part of a call, which asks for the same when it runs again in the backward."""

    def __init__(self, function: Callable[..., Any], contexts: Sequence[Contexts]) -> None:
        self.function, self.routing, self.contexts = function, _here.routing, contexts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _as_current(self.routing, carried=True), opened(self.contexts):
            return self.function(*args, **kwargs)


class _Carrying:
    """A checkpointing function that hands on what the calling thread asks for.

    Args:
        checkpoint: The function itself.
        contexts: Those of the model's adapter modules.
    """

    users = 0

    def __init__(self, checkpoint: Callable[..., Any], contexts: Sequence[Contexts]) -> None:
        self.checkpoint, self.contexts = checkpoint, contexts

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint a part of this thread's call."""
        contexts = [each for each in self.contexts if each.hold()]
        if contexts or _here.routing is not None:
            function = _Carried(function, contexts)
        return self.checkpoint(function, *args, **kwargs)


@contextmanager
def _checkpoints_carry(model: nn.Module) -> Iterator[None]:
    """Let transformers' checkpointing hand on what calls ask for, as long as any thread needs it."""
    name = "_gradient_checkpointing_func"
    places = [
        m.__dict__
        for m in model.modules()
        if name in m.__dict__ and getattr(m, "gradient_checkpointing", False)
    ]
    contexts = list(dict.fromkeys(m._contexts for m in adapter_modules(model))) if places else []
    mine: list[_Carrying] = []
    with _lock:
        for place in places:
            found = place[name]
            carrying = found if isinstance(found, _Carrying) else _Carrying(found, contexts)
            carrying.users += 1
            place[name] = carrying
            mine.append(carrying)
    try:
        yield
    finally:
        with _lock:
            for place, carrying in zip(places, mine, strict=True):
                carrying.users -= 1
                if not carrying.users and place.get(name) is carrying:
                    place[name] = carrying.checkpoint
