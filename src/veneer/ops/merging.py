"""Adding low-rank updates to stored weights with a single rounding, and measuring the share that was kept.

A 16-bit weight cannot hold a small update: of an update of 0.3 % of a bfloat16 weight, about half is
rounded away. So the sum is computed in float32, rounded once, and compared with the exact update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from veneer.errors import MergeError

#: Elements of a chunk. Smaller chunks fit a faster cache, but starting threads for them costs more.
CHUNK_ELEMENTS = 1 << 20

#: A smaller update cannot overflow any type that is wider than float16.
SMALL = 1e30

#: One summand ``scaling · B A``: ``(B: (out, r), A: (r, in), scaling)``.
Term = tuple[Tensor, Tensor, float]

#: By purpose, dtype and device; None outside of `shared_buffers`.
_buffers: ContextVar[dict[tuple[str, torch.dtype, torch.device], Tensor] | None]
_buffers = ContextVar("buffers", default=None)


@contextmanager
def shared_buffers() -> Iterator[None]:
    """Share buffers between the merges in this context: allocating them takes longer than the sums."""
    token = _buffers.set({})
    try:
        yield
    finally:
        _buffers.reset(token)


@torch.no_grad()
def merge_into_(
    weight: Tensor,
    terms: Sequence[Term],
    *,
    transpose: bool = False,
    check_finite: bool = False,
    checked: bool = False,
) -> float:
    """``W += Σ sᵢ Bᵢ Aᵢ`` in place; returns the share of the update that the stored weight kept.

    Updates are added to float32 and float64 weights directly. Any other dtype is converted by chunks of rows
    in a small float32 buffer, and rounded once for all terms together.

    Args:
        weight: ``(out, in)``, or ``(in, out)`` with `transpose`; any strides, changed in place. It may
            require grad; autograd notices the change.
        terms: ``(B: (out, r), A: (r, in), s)`` for each update; any floating dtype and device.
        transpose: the weight is stored as ``(in, out)``.
        check_finite: see `check_merge`.
        checked: `check_merge` has been called already.

    Returns:
        ``kept = 1 - ||(W_new - W) - D|| / ||D||`` for the whole update D, in float32; 1.0 when D is 0. For
        float32 and float64 weights it is 1.0 by definition and not measured: only rounding in the last place
        is lost. NaN when the merged weight is not finite.

    Raises:
        MergeError: shapes do not fit, the weight is not of a floating dtype, or the merged weight would
            not be finite (see `check_merge`). The weight is then as it was.
    """
    weight = weight.detach()
    _check_shapes(weight, terms, transpose)
    work = _work(weight)
    oriented = [_oriented(term, weight.device, work, transpose) for term in terms]
    if not checked:
        _refuse_non_finite(weight, oriented, base_too=check_finite)
    if weight.dtype == work:
        for left, right, scaling in oriented:
            weight.addmm_(left, right, alpha=scaling)
        return 1.0
    return _merge_rounded_(weight, oriented)


@torch.no_grad()
def check_merge(
    weight: Tensor, terms: Sequence[Term], *, transpose: bool = False, check_finite: bool = False
) -> None:
    """Raise if `merge_into_` would; nothing is written.

    Args:
        weight: as for `merge_into_`.
        terms: as for `merge_into_`.
        transpose: the weight is stored as ``(in, out)``.
        check_finite: also refuse a weight that already has NaN or infinite elements. An update that makes
            finite elements infinite is always refused.

    Raises:
        MergeError: see `merge_into_`.
    """
    weight = weight.detach()
    _check_shapes(weight, terms, transpose)
    oriented = [_oriented(term, weight.device, _work(weight), transpose) for term in terms]
    _refuse_non_finite(weight, oriented, base_too=check_finite)


def written_at_once(weight: Tensor, terms: Sequence[Term]) -> bool:
    """Whether `merge_into_` writes in a single operation, so that it cannot stop halfway."""
    return weight.dtype == _work(weight) and len(terms) == 1


def is_finite(tensor: Tensor) -> bool:
    """Whether no element here is NaN or infinite; True for integers, and for tensors without values."""
    values = tensor.detach()
    values = values.to_local() if hasattr(values, "to_local") else values
    if values.is_meta or values.numel() == 0 or not values.is_floating_point():
        return True
    if values.element_size() == 1:  # torch cannot compare 8-bit floats; bfloat16 has all of their values
        values = values.to(torch.bfloat16)
    low, high = torch.aminmax(values)  # propagates NaN; no copy of the tensor's size
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _work(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@torch.no_grad()
def merge_dense(weight: Tensor, delta: Tensor) -> tuple[Tensor, float]:
    """``W + D`` for a dense D of W's shape, computed in float32 (float64 if W is) and rounded once.

    Args:
        weight: any shape; not changed.
        delta: of the same shape, any floating dtype.

    Returns:
        The new weight in W's dtype, and `kept` as of `merge_into_`.

    Raises:
        MergeError: the shapes differ, or the weight is not of a floating dtype.
    """
    if weight.shape != delta.shape or not weight.is_floating_point():
        raise MergeError(
            f"cannot add an update of shape {tuple(delta.shape)} to a weight of shape {tuple(weight.shape)} "
            f"and dtype {weight.dtype}"
        )
    work = _work(weight)
    delta = delta.detach().to(device=weight.device, dtype=work)
    total = delta + weight.detach().to(work)
    if weight.dtype == work:
        return total, 1.0 if is_finite(total) else math.nan
    merged = total.to(weight.dtype)
    return merged, _kept(float(total.sub_(merged.to(work)).norm()), float(delta.norm()))


def kept_share(wanted: Tensor, error: Tensor) -> float:
    """``1 − ‖error‖ / ‖wanted‖``: the share of an update that a weight kept, which may be negative.

    Args:
        wanted: The update.
        error: The difference between the stored weight and the exact sum, of the same shape.
    """
    return _kept(float(error.norm()), float(wanted.norm()))


def _check_shapes(weight: Tensor, terms: Sequence[Term], transpose: bool) -> None:
    problems = []
    if weight.dim() != 2:
        problems.append(f"the weight has {weight.dim()} dimensions, not 2")
    if not weight.is_floating_point():
        problems.append(f"the weight is {weight.dtype}: read it out of its quantised form first")
    if not problems:
        out, inner = reversed(weight.shape) if transpose else weight.shape
        for index, (B, A, _) in enumerate(terms):
            fits = B.dim() == A.dim() == 2 and B.shape[1] == A.shape[0]
            if not fits or (B.shape[0], A.shape[1]) != (out, inner):
                problems.append(
                    f"term {index}: B {tuple(B.shape)} · A {tuple(A.shape)} is not ({out}, {inner})"
                )
    if problems:
        raise MergeError(f"cannot merge into a weight of shape {tuple(weight.shape)}: " + "; ".join(problems))


def _oriented(term: Term, device: torch.device, dtype: torch.dtype, transpose: bool) -> Term:
    """``(L, R, s)`` such that ``s L R`` has the weight's orientation."""
    B, A, scaling = term
    B = B.detach().to(device=device, dtype=dtype)
    A = A.detach().to(device=device, dtype=dtype)
    return (A.t(), B.t(), scaling) if transpose else (B, A, scaling)


def _pair_of_buffers(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _buffer("sums", 2, elements, dtype, device)


def spare_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor. Inside `shared_buffers` the next such copy overwrites it."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor.clone()
    memory = _buffer("copy", 1, tensor.numel(), tensor.dtype, tensor.device)
    return memory[0, : tensor.numel()].view(tensor.shape).copy_(tensor)


def _buffer(purpose: str, rows: int, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    held, key = _buffers.get(), (purpose, dtype, device)
    found = None if held is None else held.get(key)
    if found is None or found.shape[1] < elements:
        found = torch.empty(rows, elements, dtype=dtype, device=device)
        if held is not None:
            held[key] = found
    return found


def _sums(weight: Tensor, terms: Sequence[Term]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each chunk: the rows of the weight, their sum with the update, and a scratch buffer.

    Both float32 (float64) buffers are reused for the next chunk.
    """
    rows, columns = weight.shape
    step = max(1, min(rows, CHUNK_ELEMENTS // max(1, columns)))
    work = _work(weight)
    buffers = _pair_of_buffers(step * columns, work, weight.device)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        total, scratch = buffers[:, : part.numel()].view(2, *part.shape)
        total.copy_(part)
        for left, right, scaling in terms:
            total.addmm_(left[start : start + step], right, alpha=scaling)
        yield part, total, scratch


def _merge_rounded_(weight: Tensor, terms: Sequence[Term]) -> float:
    lost = []
    for part, total, scratch in _sums(weight, terms):
        part.copy_(total)
        error = total.sub_(scratch.copy_(part)).view(-1)
        lost.append(error.dot(error))
    if not (lost and terms):
        return 1.0
    return _kept(math.sqrt(sum(map(float, lost))), _norm(terms))


def _norm(terms: Sequence[Term]) -> float:
    """``||D||`` from the Gram matrices of the stacked factors; in float64 if the terms nearly cancel."""
    left, right, factor = terms[0]
    if len(terms) > 1:
        left = torch.cat([left * scaling for left, _, scaling in terms], dim=1)
        right = torch.cat([right for _, right, _ in terms], dim=0)
        factor = 1.0
    products = (left.t() @ left).mul_(right @ right.t())
    total = float(products.sum())
    if not total > 0.1 * float(products.abs_().sum()):
        left, right = left.double(), right.double()
        total = float(((left.t() @ left) * (right @ right.t())).sum())
    return abs(factor) * math.sqrt(max(0.0, total))


def _kept(lost: float, wanted: float) -> float:
    if not (math.isfinite(lost) and math.isfinite(wanted)):
        return math.nan
    return 1.0 if wanted == 0.0 else 1.0 - lost / wanted


def _refuse_non_finite(weight: Tensor, terms: Sequence[Term], *, base_too: bool) -> None:
    norm = torch.linalg.vector_norm
    size = sum(abs(scaling) * float(norm(left)) * float(norm(right)) for left, right, scaling in terms)
    wide = torch.finfo(weight.dtype).max > SMALL
    if weight.numel() == 0 or (wide and not base_too and size < SMALL) or _surely_finite(weight, size):
        return
    broken = before = 0
    for part, total, _ in _sums(weight, terms):
        finite = part.isfinite()
        after = total.to(part.dtype).isfinite()
        before += int((~finite).sum())
        broken += int((finite & ~after).sum())
    if not broken and not (base_too and before):
        return
    causes = [f"{before} elements of the base weight are NaN or infinite already"] if before else []
    if not all(is_finite(left) and is_finite(right) and math.isfinite(s) for left, right, s in terms):
        causes.append("the adapter's factors or its scaling are not finite (a diverged training run?)")
    elif broken:
        causes.append(f"the sum leaves the range of {weight.dtype} (merge in float32 or bfloat16)")
    raise MergeError(
        f"merging would make {broken} of {weight.numel()} elements of the weight NaN or infinite; "
        + "; ".join(causes)
        + ". The weight was not changed"
    )


def _surely_finite(weight: Tensor, size: float) -> bool:
    """Whether an upper bound, max|W| + Σ |s| ‖L‖ ‖R‖, is in range. Reads the weight once."""
    low, high = torch.aminmax(weight)
    bound = max(abs(float(low)), abs(float(high))) + size
    return bound < 0.99 * torch.finfo(weight.dtype).max  # also False if the bound is NaN
