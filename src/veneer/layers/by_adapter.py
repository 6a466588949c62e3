"""Calling what takes one adapter at a time once for each adapter of a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from veneer.errors import RoutingError
from veneer.routing import Routing


def by_adapter(
    routing: Routing,
    held: tuple[str, ...],
    kind: str,
    of: Callable[[str | None], Callable[..., Any]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    chosen: bool = False,
    by_token: bool = False,
) -> Any:
    """Call what takes one adapter at a time once for each, with its rows of every argument.

    Args:
        routing: Of the current call.
        held: The adapters that differ from the base here.
        kind: What is called, for an error.
        of: Returns what to call for the rows of an adapter, or of the base.
        args: Arguments for all rows; the first tensor says how many there are.
        kwargs: Likewise.
        chosen: See `Routing.rows_of`.
        by_token: Every tensor among the arguments is known to have a row for each token.

    Returns:
        A tensor, or a tuple of them, with the rows in their order.

    Raises:
        RoutingError: The rows are not those of the batch, or what is called gives no row for each of them.
    """
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), None)
    mine = tuple(name for name in routing.used if name in held)
    if first is None or not mine:
        return of(None)(*args, **kwargs)
    names = routing.rows_of(first, mine, lambda: kind, chosen=chosen)
    if len(set(names)) == 1:
        return of(names[0])(*args, **kwargs)
    if not by_token:
        _check_tokens(routing, first, [*args, *kwargs.values()], kind)
    count = first.shape[0]
    parts: list[tuple[Any, ...]] = []
    for name, rows in routing.indices(names, first.device).items():
        given = [_select_rows(value, rows, count) for value in args]
        named = {key: _select_rows(value, rows, count) for key, value in kwargs.items()}
        with nullcontext() if routing.tokens is None else routing.tokens.among(len(rows)):
            part = of(name)(*given, **named)
        several = isinstance(part, tuple)
        parts.append(part if several else (part,))
    whole = [_together(routing, names, own, kind) for own in zip(*parts, strict=True)]
    if routing.tokens is not None:
        for one in whole:
            routing.tokens.pass_on(first, one)
    return tuple(whole) if several else whole[0]


def _together(routing: Routing, names: tuple[str | None, ...], parts: Sequence[Any], kind: str) -> Tensor:
    """One output for all rows, of those for the rows of each adapter.

    Raises:
        RoutingError: They are not tensors with a row for each row, or for each token of a row.
    """
    given = [part.shape[0] if isinstance(part, Tensor) and part.dim() else -1 for part in parts]
    sizes = [names.count(name) for name in dict.fromkeys(names)]
    tokens = None
    if given != sizes and routing.tokens is not None:
        known = {routing.known_tokens(part) for part in parts if isinstance(part, Tensor)}
        tokens = known.pop() if len(known) == 1 else None
        if tokens is not None:
            names = tokens.along(names)
            sizes = [names.count(name) for name in dict.fromkeys(names)]
    if given != sizes:
        raise RoutingError(
            f"{kind} gives no tensor with one row for each row of the batch, so adapters cannot be mixed in "
            "one batch here"
        )
    back = routing.back(names, parts[0].device)
    whole = torch.cat(list(parts)) if back is None else torch.cat(list(parts))[back]
    if tokens is not None and routing.tokens is not None:
        routing.tokens.note(whole, tokens)
    return whole


def _check_tokens(routing: Routing, first: Tensor, given: Sequence[Any], kind: str) -> None:
    """Refuse arguments of which it is not known what each token has of them.

    Raises:
        RoutingError: There are such.
    """
    tokens = routing.known_tokens(first)
    for value in given:
        if isinstance(value, Tensor):
            known = not value.dim() or routing.known_tokens(value) == tokens
        else:
            known = tokens is None or isinstance(value, int | float | str | None)
        if not known:
            raise RoutingError(
                f"{kind} is called with tokens and a {type(value).__name__}, and what of it belongs to which "
                "token is unknown. Leave it out of the adapters, or give each adapter a batch of its own"
            )


def _select_rows(value: Any, rows: Tensor, count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
