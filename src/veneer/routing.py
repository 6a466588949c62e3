"""Which adapters one call uses: a different one for each row of the batch, or none while they are disabled.

A `Routing` belongs to one forward or one `generate`, and to the thread that runs it; layers look it up during
the call. In the same way, the contexts in which a thread has disabled adapters belong to that thread. Neither
is state of a module.

Neither outlives the call, with one exception: gradient checkpointing repeats a part of the forward in the
backward, perhaps in another thread. transformers' checkpointing is made to pass the routing on. Under any
other checkpointing the second run would silently use the active adapters, so it is refused.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapters import AdapterModule, Contexts, adapter_modules, opened, walk
from veneer.errors import RoutingError, show
from veneer.ops.dropout import Draws
from veneer.ops.mixed_batch import Layout, layouts
from veneer.ops.token_rows import LOST, TokenRows, Tokens, tensors_in
from veneer.variants.alora import Activation

#: The name that stands for the base model without an adapter.
BASE = "__base__"


class Routing:
    """The adapter of each row of a batch.

    Args:
        names: One for each row; `BASE` for none.
        expand: Into how many neighbouring rows of a layer's input each row may be expanded (beams, samples).
        activation: The positions from which invoked adapters act.
        adapters: All adapters that batches of this kind may use. A compiled layer computes with each of them,
            so that another choice of adapters changes only values. By default those of this batch.
        device: The device of the layers.
        draws: By adapter, what decides which elements its dropout drops; torch's global generator for
            adapters without any.
        flattening: The modules in which tokens are followed, since rows and tokens may share an axis there.
        direct: A layer is called by itself, with the rows that the names are for.
    """

    def __init__(
        self,
        names: Sequence[str],
        expand: int = 1,
        activation: Activation | None = None,
        adapters: Sequence[str] = (),
        device: torch.device | str = "cpu",
        draws: Mapping[str, Draws] = MappingProxyType({}),
        flattening: Sequence[nn.Module] = (),
        direct: bool = False,
    ) -> None:
        self.names = tuple(names)
        #: The adapters of the batch, without the base, in order of appearance.
        self.used = tuple(dict.fromkeys(name for name in self.names if name != BASE))
        #: The number of names; a compiler that read the names would compile once for each batch of them.
        self.count = len(self.names)
        #: For each adapter, which rows are its own: (rows,) of bool.
        self.mine: dict[str, Tensor] = {}
        if self.names:
            slots = tuple(adapters) or self.used
            whose = [[owner == name for name in self.names] for owner in slots]
            rows = torch.tensor(whose, dtype=torch.bool, device=device)
            self.mine = dict(zip(slots, rows, strict=True))
        self.activation = activation
        self.draws = draws
        self.expand = expand
        self.flattening = flattening if self.names else ()
        self.tokens = TokenRows({self.count, self.count * expand}) if self.flattening else None
        self.direct = direct
        #: Layers that ran inside a checkpoint that does not pass this routing on.
        self.recomputed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._rows: dict[Any, Any] = {}
        #: Results that layers keep during this call, by layer. The keys are references, so none is reused.
        self.memo: dict[nn.Module, Any] = {}

    def draws_for(self, name: str, x: Tensor) -> Draws | None:
        """What decides which elements of a layer's input an adapter drops. x: (rows, ...)."""
        draws, tokens = self.draws.get(name), self.known_tokens(x) or LOST
        if draws is None or draws.filled == (tokens.each or (x.shape[1] if x.dim() > 2 else 0)):
            return draws
        return draws._replace(tokens=1, filled=1)  # not text

    def concerns(self, held: Container[str]) -> bool:
        return any(name in held for name in self.used)

    def known_tokens(self, x: Tensor) -> Tokens | None:
        """The tokens that x has in its first axis, or `LOST`; None if nothing is known."""
        return None if self.tokens is None else self.tokens.of(x)

    def rows_of(
        self, x: Tensor, held: tuple[str, ...], where: Callable[[], str], *, chosen: bool = False
    ) -> tuple[str | None, ...]:
        """The adapter of each row of a layer's input, or of each token where both are in the first axis.

        Args:
            x: (rows, ...) or (rows · tokens, ...), the layer's input.
            held: The adapters of the layer.
            where: Returns the layer's name for an error.
            chosen: The model may call the layer with tokens that it chose, of which there can be as many as
                rows. Without a second axis, only tokens that were followed are then taken.

        Raises:
            RoutingError: It is not known to which row of the batch each of x belongs.
        """
        tokens = self.known_tokens(x)
        if tokens is None and chosen and x.dim() < 3 and not self.direct:
            tokens = LOST
        return self.rows(x.shape[0] if x.dim() else 0, held, where, tokens=tokens)

    def rows(
        self, count: int, held: tuple[str, ...], where: Callable[[], str], *, tokens: Tokens | None = None
    ) -> tuple[str | None, ...]:
        """`rows_of` an input of so many rows.

        Args:
            count: Number of rows of the layer's input.
            held: The adapters of the layer.
            where: Returns the layer's name for an error.
            tokens: The tokens that are side by side, or `LOST`; None for rows.

        Raises:
            RoutingError: As `rows_of`.
        """
        key = (count, held, tokens)
        if key not in self._rows:
            mine = tuple([name if name in held else None for name in self.names])
            if tokens == LOST and len(set(mine)) > 1:
                raise RoutingError(
                    f"to which row each token belongs that reaches {where()} is unknown: the model chose or "
                    "sorted them, or did what cannot be followed, as in a part that is compiled by itself. "
                    "Leave it out of the adapters, or give each adapter a batch of its own"
                )
            if tokens == LOST:
                self._rows[key] = mine[:1] * count
            else:
                tokens = tokens or Tokens(self._times(count, where))
                each = count // (tokens.copies * self.count)
                self._rows[key] = tokens._replace(each=each).along(mine)
        found: tuple[str | None, ...] = self._rows[key]
        return found

    def _times(self, count: int, where: Callable[[], str]) -> int:
        """How many rows of a layer's input each row of the batch has become."""
        times, rest = count // self.count, count % self.count  # no divmod, which compilers do not know
        if rest or times not in (1, self.expand):
            raise RoutingError(
                f"adapter_names has {self.count} names, but the input of {where()} has {count} rows: "
                "which adapter each belongs to is unknown. Pass one name for each row of the batch; a "
                "model that packs the rows of a batch together inside cannot mix adapters in one batch"
            )
        return times

    def slots(self, held: Sequence[str], x: Tensor, where: Callable[[], str]) -> Iterator[tuple[str, Tensor]]:
        """For each adapter of a layer, which rows of the layer's input are its own: (rows,) of bool.

        Only the values of these tensors depend on the names, so compiled code can be reused.

        Args:
            held: The adapters of the layer.
            x: (rows, ...), the layer's input.
            where: Returns the layer's name for an error.
        """
        times = self._times(x.shape[0] if x.dim() else 0, where)
        for name in held:
            if name in self.mine:
                mine = self.mine[name].to(x.device)
                yield name, mine if times == 1 else mine.repeat_interleave(times)

    def layouts(self, names: tuple[str | None, ...]) -> list[Layout]:
        """`veneer.ops.mixed_batch.layouts` of the names, computed once."""
        if names not in self._rows:
            self._rows[names] = layouts(names)
        found: list[Layout] = self._rows[names]
        return found

    def order(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Row numbers as an index tensor."""
        key = (rows, device)
        if key not in self._rows:
            self._rows[key] = torch.tensor(rows, device=device)
        found: Tensor = self._rows[key]
        return found

    def indices(self, names: tuple[str | None, ...], device: torch.device) -> dict[str | None, Tensor]:
        """The rows of each adapter, as index tensors."""
        key = (names, device)
        if key not in self._rows:
            found = {name: torch.tensor(rows, device=device) for name, rows in _rows_by_name(names).items()}
            self._rows[key] = found
        known: dict[str | None, Tensor] = self._rows[key]
        return known

    def back(self, names: tuple[str | None, ...], device: torch.device) -> Tensor | None:
        """What puts rows that lie adapter by adapter into their places; None if they do."""
        key = ("back", names, device)
        if key not in self._rows:
            order = [row for rows in _rows_by_name(names).values() for row in rows]
            places = sorted(order, key=order.__getitem__)  # the inverse
            self._rows[key] = None if order == sorted(order) else torch.tensor(places, device=device)
        found: Tensor | None = self._rows[key]
        return found

    def note(self, layer: nn.Module) -> None:
        """Remember a layer that a checkpoint will recompute without this routing."""
        if torch.compiler.is_compiling() or _here.carried:
            return
        saved: object = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if saved is not None or (self.with_grad and not torch.is_grad_enabled()):
            self.recomputed.add(layer)

    with_grad = False


class _Here(threading.local):
    """The routing of the thread's current call. Compilers guard on the attributes."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        #: Whether the checkpoint around the call passes the routing on.
        self.carried = False


_here = _Here()
#: Guards what threads share: `_alive`, and the checkpointing functions of a model. It is reentrant because
#: the garbage collector may close a context anywhere.
_lock = threading.RLock()
_alive: weakref.WeakSet[Routing] = weakref.WeakSet()
#: The routing of layers whose adapters are disabled in this thread.
_NO_ROWS = Routing(())


def current(layer: AdapterModule) -> Routing | None:
    """The routing of the current call of a layer; None if the active adapters are used.

    While this thread has the layer's adapters disabled, no row of the routing has an adapter.

    Raises:
        RoutingError: The layer is recomputed in a backward, and the routing of its call is lost.
    """
    routing, contexts = _here.routing, layer._contexts
    if routing is not None:
        routing.note(layer)
    if contexts.open and contexts.hold():
        return _NO_ROWS
    if routing is not None:
        return routing if routing.count else None
    # Inside a backward, which compilers do not trace. This runs at every call of every layer.
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        _refuse_recomputation(layer)
    return None


def draws_of(name: str, x: Tensor) -> Draws | None:
    routing = _here.routing
    return None if routing is None else routing.draws_for(name, x)


def acting(layer: nn.Module, name: str, where: str, x: Tensor) -> Tensor:
    """The positions on which an adapter acts in this call. x: (rows, tokens, in) or (rows, in) -> (...) bool.

    Args:
        layer: The layer that is being called.
        name: The adapter.
        where: The layer's name for an error.
        x: The layer's input, or the rows of it that use the adapter.

    Raises:
        RoutingError: The call defines no positions, or not for these rows.
    """
    routing = _here.routing
    activation = None if routing is None else routing.activation
    if routing is None or activation is None:
        raise RoutingError(
            f"{name!r} is an aLoRA: it acts from its invocation tokens on, and this call of {where} does not "
            "say where they are. Call the PeftModel that holds it, with input_ids or alora_offsets; for "
            "gradient checkpointing use that of transformers"
        )
    if name not in activation.offsets:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    count = len(activation.offsets[name])
    # A compiled layer passes every row to every adapter, and selects afterwards.
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


def _refuse_recomputation(layer: nn.Module) -> None:
    if not _alive:
        return
    with _lock:
        known = any(layer in routing.recomputed for routing in _alive)
    if known:
        raise RoutingError(
            "a part of the model is computed again in the backward (gradient checkpointing), and whether its "
            "call named adapters for rows or had them disabled is no longer known. With adapter_names and "
            "under disable_adapter use the model's own checkpointing (gradient_checkpointing_enable of a "
            "transformers model), or none"
        )


def _rows_by_name(names: Sequence[str | None]) -> dict[str | None, list[int]]:
    found: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return found


@contextmanager
def routed(
    model: nn.Module,
    names: Sequence[str],
    expand: int = 1,
    activation: Activation | None = None,
    adapters: Sequence[str] = (),
    draws: Mapping[str, Draws] = MappingProxyType({}),
    flattening: Sequence[nn.Module] = (),
) -> Iterator[Routing]:
    """Send each row of a batch through its own adapter, inside this context.

    Args:
        model: The model that is called inside.
        names: The adapter of each row.
        expand: See `Routing`.
        activation: See `Routing`.
        adapters: See `Routing`.
        draws: See `Routing`.
        flattening: See `Routing`.
    """
    first = next(model.parameters(), None)
    device = "cpu" if first is None or first.is_meta else first.device
    routing = Routing(names, expand, activation, adapters, device, draws, flattening)
    routing.with_grad = torch.is_grad_enabled()
    # Nothing is recomputed without a graph.
    carried = _checkpoints_carry(model) if routing.with_grad else nullcontext()
    with carried, _as_current(routing):
        yield routing


@contextmanager
def disabled(model: nn.Module, *more: Contexts) -> Iterator[None]:
    """Let a model compute what its base computes, in the thread that opens this context.

    Args:
        model: The model.
        *more: Contexts of adapter modules that will be added to the model meanwhile.
    """
    everywhere = dict.fromkeys((*more, *(module._contexts for module in adapter_modules(model))))
    with _checkpoints_carry(model), opened(everywhere):
        yield


@contextmanager
def _as_current(routing: Routing | None, carried: bool = False) -> Iterator[None]:
    before = _here.routing, _here.carried
    modules = () if routing is None or routing is _here.routing else routing.flattening
    _here.routing, _here.carried = routing, carried
    try:
        with _replaced(modules, "forward", _followed) if modules else nullcontext():
            yield
    finally:
        _here.routing, _here.carried = before


def call_by_rows(layer: AdapterModule, names: Sequence[str] | None, *args: Any, **kwargs: Any) -> Any:
    """Call one layer by itself, with each row of its input going through its own adapter.

    Args:
        layer: The layer.
        names: The adapter of each row, `BASE` for none; None uses the active adapters.
        *args: What the layer's forward takes.
        **kwargs: Likewise.

    Raises:
        RoutingError: For adapters that cannot be mixed, or names that do not fit the rows.
    """
    forward = type(layer).forward  # not the instance's, which offloading replaces by one that calls this
    if names is None:
        return forward(layer, *args, **kwargs)
    check_mixed_batch(names, layer.held_adapters, [layer])
    with _as_current(Routing(names, direct=True)):
        return forward(layer, *args, **kwargs)


def check_mixed_batch(
    names: Sequence[str], known: Collection[str], modules: Iterable[AdapterModule], more: Sequence[str] = ()
) -> None:
    """Refuse names for the rows of a batch that cannot be served.

    Args:
        names: One for each row; `BASE` for none.
        known: The adapters that there are.
        modules: All modules that hold adapters.
        more: Other reasons against mixing adapters in one batch.

    Raises:
        RoutingError: Listing all that is wrong.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise RoutingError(f"adapter_names is a list of names, one for each row, got {names!r}")
    problems = []
    used = list(dict.fromkeys(name for name in names if name != BASE))
    if not names:
        problems.append("it is empty: one name for each row of the batch is needed")
    if unknown := [name for name in used if name not in known]:
        have = ", ".join(map(repr, [*known, BASE]))
        problems.append(f"no adapter named {', '.join(map(show, unknown))}; there are: {have}")
    if merged := sorted({n for module in modules for n in module.merged_adapters}):
        problems.append(
            f"{', '.join(map(repr, merged))} is merged into the weights, so no row would be without it: "
            "unmerge_adapter() first"
        )
    problems += more
    if problems:
        raise RoutingError("this batch cannot be mixed:\n" + "\n".join(f"  - {p}" for p in problems))


def keep_for_backward(output: Any, routing: Routing) -> None:
    """Keep the routing alive as long as the graph of an output, so that a recomputation is recognised."""
    routing.memo.clear()
    if not routing.recomputed:
        return
    for tensor in tensors_in(output):
        if tensor.grad_fn is not None:
            kept: dict[str, object] = tensor.grad_fn.metadata  # type: ignore[assignment]
            kept["veneer.routing"] = routing
            with _lock:
                _alive.add(routing)


class _Carried:
    """A part of a call that uses the same routing, and the same random numbers, when it is recomputed."""

    def __init__(self, function: Callable[..., Any], contexts: Sequence[Contexts]) -> None:
        self.function, self.routing, self.contexts = function, _here.routing, contexts
        self.states: dict[torch.Generator, Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        draws = () if self.routing is None else self.routing.draws.values()
        now = {one.generator: one.generator.get_state() for one in draws}
        again, self.states = self.states is not None, self.states or now
        for generator, state in self.states.items():
            generator.set_state(state)
        try:
            with _as_current(self.routing, carried=True), opened(self.contexts):
                return self.function(*args, **kwargs)
        finally:
            if again:
                for generator, state in now.items():
                    generator.set_state(state)


def _carrying(checkpoint: Callable[..., Any], contexts: Sequence[Contexts]) -> Callable[..., Any]:
    """A checkpointing function that passes on the routing of the calling thread.

    Args:
        checkpoint: The original function.
        contexts: The contexts of the model's adapter modules.
    """

    def carry(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        held = [each for each in contexts if each.hold()]
        if held or _here.routing is not None:
            function = _Carried(function, held)
        return checkpoint(function, *args, **kwargs)

    return carry


@contextmanager
def _checkpoints_carry(model: nn.Module) -> Iterator[None]:
    """Let transformers' checkpointing pass routings on, as long as any thread needs it."""
    name = "_gradient_checkpointing_func"
    modules = [
        m for _, m in walk(model) if name in m.__dict__ and getattr(m, "gradient_checkpointing", False)
    ]
    contexts = list(dict.fromkeys(m._contexts for m in adapter_modules(model))) if modules else []
    with _replaced(modules, name, lambda found: _carrying(found, contexts)):
        yield


def _followed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward in which tokens are followed to their rows. Compilers leave it alone: they could not."""
    return partial(_uncompiled_follow() if "torch._dynamo" in sys.modules else _follow, forward)


def _follow(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    routing = _here.routing  # None in the call of another thread
    with nullcontext() if routing is None or routing.tokens is None else routing.tokens:
        return forward(*args, **kwargs)


@cache
def _uncompiled_follow() -> Callable[..., Any]:
    function: Callable[..., Any] = torch.compiler.disable(_follow)  # type: ignore[no-untyped-call]
    return function


class _Replacement(NamedTuple):
    """A function of a module that stands in for another one.

    Attributes:
        before: What the module itself had under that name; None for nothing.
        now: The function.
        users: How many calls need it, in the one element.
    """

    before: Callable[..., Any] | None
    now: Callable[..., Any]
    users: list[int]


#: By the identities of the functions.
_replacements: dict[int, _Replacement] = {}


@contextmanager
def _replaced(
    modules: Iterable[nn.Module], name: str, by: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let modules have another function under a name, as long as any thread needs it.

    Args:
        modules: The modules.
        name: Of the function.
        by: Returns the function that replaces a given one.
    """
    mine: list[tuple[dict[str, Any], _Replacement]] = []
    with _lock:
        for module in modules:
            place = module.__dict__
            found = _replacements.get(id(place.get(name)))
            if found is None:
                found = _Replacement(place.get(name), by(getattr(module, name)), [0])
                place[name] = found.now
                _replacements[id(found.now)] = found
            found.users[0] += 1
            mine.append((place, found))
    try:
        yield
    finally:
        with _lock:
            for place, replacement in mine:
                replacement.users[0] -= 1
                if replacement.users[0]:
                    continue
                del _replacements[id(replacement.now)]
                if place.get(name) is not replacement.now:
                    continue
                if replacement.before is None:
                    del place[name]
                else:
                    place[name] = replacement.before
