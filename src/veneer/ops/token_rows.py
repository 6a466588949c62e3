"""Which row of a batch each token belongs to, where a model has rows and tokens in one axis.

Mixtures flatten (rows, tokens, features) to (rows · tokens, features) before their experts. A tensor then
does not show which row its tokens are from, and one of chosen tokens may be as long. So tokens are followed
from the operation that flattens them, also where a mixture repeats all of them, once for each expert.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_T = TypeVar("_T")


class Tokens(NamedTuple):
    """The order of the tokens of a batch along an axis: copy by copy, row by row.

    Attributes:
        each: How many there are of each row.
        copies: How often all of them are there, one copy after the other.
        axis: 0, or 1 in a matrix that was transposed.
    """

    each: int
    copies: int = 1
    axis: int = 0

    def along(self, rows: Sequence[_T]) -> tuple[_T, ...]:
        """What the rows have, for each token."""
        return tuple([row for row in rows for _ in range(self.each)]) * self.copies


#: The tokens of a tensor are some of the batch, in an order that is not known.
LOST = Tokens(0)


class _Note(NamedTuple):
    tensor: weakref.ref[Tensor]
    tokens: Tokens
    version: int


class TokenRows(TorchFunctionMode):
    """Follows tokens from the operation that flattens them, as long as they stay in order.

    Flattening a tensor whose first axis is that of the rows is noted for the result. Operations on each token
    by itself pass the note on. What any other operation makes of such tokens is noted as lost, and so is a
    tensor that was written to through another one (which is not seen in inference mode). Compiled code is not
    looked into: nothing is known of its tensors.

    Args:
        counts: How long the first axis of a tensor with a row for each of the batch may be.
    """

    def __init__(self, counts: Collection[int]) -> None:
        super().__init__()
        self.counts = frozenset(counts)
        self._notes: dict[int, _Note] = {}

    def of(self, x: Tensor) -> Tokens | None:
        """The tokens along the first axis of x; `LOST`; None if nothing is known."""
        known = self._known(x)
        return LOST if known is not None and known.axis else known

    def _known(self, x: Tensor) -> Tokens | None:
        note = None if torch.compiler.is_compiling() else self._notes.get(id(x))
        if note is None or note.tensor() is not x:
            return None
        return note.tokens if note.version == _version(x) else LOST

    def note(self, x: Tensor, tokens: Tokens) -> None:
        """Note which tokens x has, or `LOST`."""
        key = id(x)
        gone = weakref.ref(x, lambda _: self._notes.pop(key, None))
        self._notes[key] = _Note(gone, tokens, _version(x))

    def pass_on(self, x: Tensor, y: Any) -> None:
        """Note for y what is known of x: it is whole rows of x, or was computed from each token by itself."""
        tokens = self.of(x)
        if tokens is not None and isinstance(y, Tensor):
            self.note(y, tokens)

    @contextmanager
    def among(self, count: int) -> Iterator[None]:
        """Follow the tokens of so many rows too, which are a part of the batch."""
        before, self.counts = self.counts, self.counts | {count}
        try:
            yield
        finally:
            self.counts = before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in _VIEWS:
            result = func(*args, **kwargs)
            self._after_view(args[0], result)
            return result
        given = [*tensors_in(args), *tensors_in(kwargs)] if self._notes else []
        # Before the call, which may write to them.
        known = [(x, tokens) for x in given if (tokens := self._known(x)) is not None]
        result = func(*args, **kwargs)
        if known:
            self._after(func, args, kwargs, known, result)
        return result

    def _after_view(self, x: Tensor, result: Tensor) -> None:
        tokens = self._known(x)
        if tokens is not None:
            # A view keeps the order of the elements, so it keeps tokens whole if it keeps their number.
            if result.shape[: tokens.axis + 1] == x.shape[: tokens.axis + 1]:
                self._mark(result, tokens)
            elif tokens.axis and result.shape[0] == x.numel():
                self._mark(result, Tokens(tokens.each, x.shape[0]))
            else:
                self._mark(result, LOST)
        elif (
            x.dim() > 2
            and result.dim() == 2
            and x.shape[-1] == result.shape[-1]
            and x.shape[0] in self.counts
        ):
            self.note(result, Tokens(result.shape[0] // x.shape[0]))

    def _after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        known: Sequence[tuple[Tensor, Tokens]],
        result: Any,
    ) -> None:
        if func is Tensor.__setitem__:
            self._mark(args[0], LOST)
            return
        x, tokens = known[0]
        moved = _MOVING.get(func)
        if moved is not None:
            self._mark(result, moved(x, tokens, args) if x is args[0] and not kwargs else LOST)
            return
        for y in tensors_in(result):
            if func in _ELEMENTWISE:
                kept = all(x.dim() == y.dim() and _as_long(x, t, y) for x, t in known)
            else:
                leaves = _ALONG.get(func)
                kept = leaves is not None and x is args[0] and not tokens.axis and leaves(x, args, kwargs)
                kept = kept and all(_as_long(x, t, y) for x, t in known)
            self._mark(y, tokens if kept and all(other == tokens for _, other in known) else LOST)

    def _mark(self, y: Tensor, tokens: Tokens) -> None:
        """Note that, except that a tensor with an axis for rows and one for tokens is never lost."""
        if y.dim() and (tokens != LOST or y.dim() < 3):
            self.note(y, tokens)


def _as_long(x: Tensor, tokens: Tokens, y: Tensor) -> bool:
    return x.shape[: tokens.axis + 1] == y.shape[: tokens.axis + 1]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, and of the mappings and sequences in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def _called(*names: str) -> Iterator[Callable[..., Any]]:
    """The functions and methods of torch that have these names."""
    for name in names:
        for place in (torch, Tensor, F):
            found = getattr(place, name, None)
            if callable(found):
                yield found


_VIEWS = frozenset(_called("view", "reshape", "flatten"))
#: Each element of the result is made of elements in the same place, of tensors that are as long or broadcast.
_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "div",
    "true_divide",
    "pow",
    "maximum",
    "minimum",
    "clamp",
    "where",
    "masked_fill",
)
_UNARY = (
    *("neg", "abs", "exp", "log", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "erf", "sigmoid", "tanh"),
    *("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "hardswish", "dropout"),
    *("float", "half", "double", "bfloat16", "bool", "long", "type", "contiguous", "clone", "detach"),
    *("logical_not", "bitwise_not", "zeros_like", "ones_like", "empty_like", "full_like"),
)
_OPERATORS = ("add", "sub", "mul", "truediv", "pow")
_ELEMENTWISE = frozenset(
    _called(
        *_ARITHMETIC,
        *_UNARY,
        *(f"{name}_" for name in (*_ARITHMETIC, *_UNARY)),
        *(f"__{kind}{name}__" for name in _OPERATORS for kind in ("", "r", "i")),
        *("__neg__", "__invert__"),
    )
)


_Leaves = Callable[[Tensor, tuple[Any, ...], Mapping[str, Any]], bool]


def _along(position: int, default: int | None, added: int = 0) -> _Leaves:
    """Whether an operation along the axes that this argument names leaves the first one alone."""

    def leaves(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        given = kwargs.get("dim", args[position] if len(args) > position else default)
        axes = given if isinstance(given, tuple | list) else (given,)
        return bool(axes) and all(isinstance(axis, int) and axis % (x.dim() + added) for axis in axes)

    return leaves


def _itself(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return True


def _no_new_axis(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return len(args[1] if isinstance(args[1], tuple | list) else args[1:]) == x.dim()


def _times_matrix(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return len(args) > 1 and args[1].dim() == 2


def _normalised(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return len(args[1] if len(args) > 1 else kwargs["normalized_shape"]) < x.dim()


def _whole_axis(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    first = index[0] if index else None
    if first is Ellipsis:
        return len(index) <= x.dim()
    return isinstance(first, slice) and first == slice(None)


def _transposed(x: Tensor, tokens: Tokens, args: tuple[Any, ...]) -> Tokens:
    if x.dim() != 2 or tokens.copies > 1 or len({axis % 2 for axis in args[1:]}) == 1:
        return LOST
    return tokens._replace(axis=1 - tokens.axis)


def _repeated(x: Tensor, tokens: Tokens, args: tuple[Any, ...]) -> Tokens:
    times = args[1] if isinstance(args[1], tuple | list) else args[1:]
    return LOST if tokens.axis or len(times) > x.dim() else tokens._replace(copies=times[0] * tokens.copies)


#: What operations that move whole tokens make of them.
_MOVING: dict[Callable[..., Any], Callable[[Tensor, Tokens, tuple[Any, ...]], Tokens]] = {
    **dict.fromkeys(_called("transpose", "swapaxes", "t"), _transposed),
    **dict.fromkeys(_called("repeat"), _repeated),
}
#: Operations on the other axes of their first argument, and when they are.
_ALONG: dict[Callable[..., Any], _Leaves] = {
    **dict.fromkeys(
        _called("softmax", "log_softmax", "sum", "mean", "amax", "max", "argmax"), _along(1, None)
    ),
    **dict.fromkeys(_called("gather", "scatter", "scatter_", "squeeze", "cumsum"), _along(1, None)),
    **dict.fromkeys(_called("unsqueeze"), _along(1, None, 1)),
    **dict.fromkeys(_called("topk"), _along(2, -1)),
    **dict.fromkeys(_called("chunk", "split"), _along(2, 0)),
    **dict.fromkeys(_called("linear", "matmul", "mm", "__matmul__"), _times_matrix),
    **dict.fromkeys(_called("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(_called("to", "type_as"), _itself),
    **dict.fromkeys(_called("expand"), _no_new_axis),
    Tensor.__getitem__: _whole_axis,
}
