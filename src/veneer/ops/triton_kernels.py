"""Kernels for the fused linear step on a GPU, in Triton's language. Only `veneer.ops.triton_lora` calls them.

Whether an element of X is kept is a pure function of a seed and the element's position: a Philox generator
gives four 32-bit words for the counter (column // 4, row), and the element is dropped if its word is below
``p * 2**32``. Each kernel computes the words that it needs, so no mask, positions or second X are stored.

Offsets of rows and columns are 64-bit, so that tensors may have more than 2**31 elements. All sums are
float32. Ranks are padded to a block of at least 16, which is what the matrix units take.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, threshold, rows, first, COLUMNS: tl.constexpr):
    """``(len(rows), COLUMNS)``: which elements dropout keeps, from column `first` on, a multiple of 4."""
    group = first // 4 + tl.arange(0, COLUMNS // 4)
    row = rows.to(tl.int32)[:, None] + tl.zeros((1, COLUMNS // 4), tl.int32)
    column = group[None, :] + row * 0
    zero = row * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed), column, row, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes count 0 1 2 3
    return tl.reshape(words, (rows.shape[0], COLUMNS)) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["threshold"])
def product(
    x, y, left, right, bias, branch_bias, out, seed, threshold, scaling,
    M, N, K, R, x_row, x_column, y_row, y_column, right_row, right_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """``out = keep * (left right) + x y + bias + scaling branch_bias``, one block of out a program.

    ``left: (M, R)``, ``right: (R, N)``, ``x: (M, K)``, ``y: (K, N)``, ``out: (M, N)``; keep only if there is
    a seed. The accumulator starts with the low-rank product, so it needs no pass over out.
    """
    # Blocks that share rows of x or columns of y run close together, which helps the cache.
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    block_m = group * GROUP + (program % (GROUP * across)) % height
    block_n = (program % (GROUP * across)) // height
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m < M, n < N
    rows, columns = m.to(tl.int64), n.to(tl.int64)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        low = tl.load(
            left + rows[:, None] * R + r[None, :], mask=inside_m[:, None] & (r < R)[None, :], other=0.0
        )
        factor = tl.load(
            right + r[:, None] * right_row + columns[None, :] * right_column,
            mask=(r < R)[:, None] & inside_n[None, :],
            other=0.0,
        )
        sums = tl.dot(low, factor, sums, input_precision="ieee")
    if seed is not None:
        sums = tl.where(kept(seed, threshold, m, block_n * BLOCK_N, BLOCK_N), sums, 0.0)

    # Rows and columns outside wrap around to valid ones; their sums are never stored.
    k = tl.arange(0, BLOCK_K)
    at_x = x + (rows % M)[:, None] * x_row + k[None, :] * x_column
    at_y = y + k[:, None] * y_row + (columns % N)[None, :] * y_column
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        a = tl.load(at_x, mask=inside[None, :], other=0.0)
        b = tl.load(at_y, mask=inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        at_x += BLOCK_K * x_column
        at_y += BLOCK_K * y_row

    if bias is not None:
        sums += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if branch_bias is not None:
        sums += scaling * tl.load(branch_bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + rows[:, None] * N + columns[None, :],
        sums.to(out.dtype.element_ty),
        mask=inside_m[:, None] & inside_n[None, :],
    )


@triton.jit(do_not_specialize=["threshold"])
def projection(
    x, a, out, seed, threshold, scale,
    M, K, R, x_row, x_column, a_row, a_column,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out = scale (keep * x) aᵀ``: ``x: (M, K)``, ``a: (R, K)``, ``out: (M, R)``; keep where a seed is."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, k = m.to(tl.int64), tl.arange(0, BLOCK_K)
    at_x = x + (rows % M)[:, None] * x_row + k[None, :] * x_column
    at_a = a + k[:, None] * a_column + (r % R).to(tl.int64)[None, :] * a_row
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        values = tl.load(at_x, mask=inside[None, :], other=0.0)
        if seed is not None:
            values = tl.where(kept(seed, threshold, m, start, BLOCK_K), values, 0.0)
        factor = tl.load(at_a, mask=inside[:, None], other=0.0)
        sums = tl.dot(values, factor, sums, input_precision="ieee")
        at_x += BLOCK_K * x_column
        at_a += BLOCK_K * a_column
    tl.store(
        out + rows[:, None] * R + r[None, :],
        (sums * scale).to(out.dtype.element_ty),
        mask=(m < M)[:, None] & (r < R)[None, :],
    )


@triton.jit(do_not_specialize=["threshold"])
def correlation(
    g, x, out, seed, threshold,
    M, N, R, x_row, x_column, rows_each,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``out[i] = gᵀ (keep * x)`` over the i-th `rows_each` rows: ``g: (M, R)``, ``x: (M, N)``.

    ``out: (parts, R, N)``. The rows are divided among programs, since R x N has too few blocks to fill a GPU.
    The caller adds up the parts, which always gives the same sum; atomic additions would not.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2)
    columns = n.to(tl.int64)
    sums = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(part * rows_each, min(part * rows_each + rows_each, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        rows, inside = m.to(tl.int64), m < M
        low = tl.load(g + rows[None, :] * R + r[:, None], mask=inside[None, :] & (r < R)[:, None], other=0.0)
        values = tl.load(
            x + rows[:, None] * x_row + columns[None, :] * x_column,
            mask=inside[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if seed is not None:
            values = tl.where(kept(seed, threshold, m, tl.program_id(0) * BLOCK_N, BLOCK_N), values, 0.0)
        sums = tl.dot(low, values, sums, input_precision="ieee")
    tl.store(
        out + (part * R + r).to(tl.int64)[:, None] * N + columns[None, :],
        sums,
        mask=(r < R)[:, None] & (n < N)[None, :],
    )


@triton.jit(do_not_specialize=["threshold"])
def mask(out, seed, threshold, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write as bytes which elements are kept: ``out: (M, N)``."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = kept(seed, threshold, m, tl.program_id(1) * BLOCK_N, BLOCK_N)
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, keep.to(tl.int8), mask=(m < M)[:, None] & (n < N)[None, :])
