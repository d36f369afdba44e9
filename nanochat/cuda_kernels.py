# pyright: reportOperatorIssue=false
"""Triton kernels of the decode step: a matrix times one row or some, attention of one new token, small sums.

One token at a time, a step is bound by how fast weights and keys come out of memory, and by how many kernels have
to be started. So what lies between two reads of memory is done by the kernel that reads: norms, rotations,
squares, residuals, writing the new key. Arithmetic is fp32. Imported only where Triton is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matrix_row(
    x, w0, w1, w2, s0, s1, s2, residual, out, n0, n1, num_outputs, eps, softcap,
    K: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, SQUARE: tl.constexpr, RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = f(W x) for one row x of K numbers and W (num_outputs, K), each program BLOCK_N outputs; BLOCK_K >= K.

    PARTS = 3: W is w0, w1 and w2 below each other, the first two of n0 and n1 rows (multiples of BLOCK_N).
    NORM: x is divided by its root mean square, which may as well happen after the product. SCALED: int8 or e4m3
    weights with a factor per output. f: the square of what is positive, a residual to add, or softcap * tanh(y /
    softcap).
    """
    first = tl.program_id(0) * BLOCK_N
    w, scale, base = w0, s0, first * 0
    if PARTS == 3:
        if first >= n0 + n1:
            w, scale, base = w2, s2, n0 + n1
        elif first >= n0:
            w, scale, base = w1, s1, n0
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    real, inside = first + n < num_outputs, k < K
    rows = w + (first - base + n).to(tl.int64)[:, None] * K
    w_NK = tl.load(rows + k[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    x_K = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    y = tl.sum(w_NK.to(tl.float32) * x_K[None, :], axis=1)
    if SCALED:
        y *= tl.load(scale + first - base + n, mask=real, other=0.0)
    if NORM:
        y *= 1.0 / tl.sqrt(tl.sum(x_K * x_K, axis=0) / K + eps)
    if SQUARE:
        y = tl.where(y > 0, y * y, 0.0)
    if RESIDUAL:
        y += tl.load(residual + first + n, mask=real, other=0.0).to(tl.float32)
    if SOFTCAP:
        y = softcap * (2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0)
    tl.store(out + first + n, y.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["num_rows"])  # or each number of rows would be compiled twice
def matrix_rows(
    x, w0, w1, w2, s0, s1, s2, residual, out, partial, arrived, num_rows, n0, n1, n2, softcap,
    K: tl.constexpr, LAYERS: tl.constexpr, SQUARE: tl.constexpr, RESIDUAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = f(x W^T) for x (num_rows, K), num_rows <= BLOCK_M, and quantised W, read once; f as in matrix_row.

    Program (block, part): BLOCK_N outputs of one layer over one part of K, weights widened in registers.
    LAYERS = 3: W is w0, w1 and w2 below each other, of n0, n1 and n2 rows. PARTS > 1: sums go to `partial`
    (blocks, PARTS, BLOCK_N, BLOCK_M), and the part of a block that comes last adds them up, in their order;
    `arrived` (blocks,) counts them and is zero before and after.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    w, scale, outputs, block, base = w0, s0, n0, tile, tile * 0
    if LAYERS == 3:
        blocks0, blocks1 = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
        if tile >= blocks0 + blocks1:
            w, scale, outputs, block, base = w2, s2, n2, tile - blocks0 - blocks1, n0 + n1
        elif tile >= blocks0:
            w, scale, outputs, block, base = w1, s1, n1, tile - blocks0, n0
    m, n, k = tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w_rows, x_columns = w + n.to(tl.int64)[:, None] * K, x + m[None, :] * K
    real_n, real_m = (n < outputs)[:, None], (m < num_rows)[None, :]
    share: tl.constexpr = (K + BLOCK_K * PARTS - 1) // (BLOCK_K * PARTS) * BLOCK_K
    begin = part * share
    # Weights are the left operand: each warp has outputs of its own, so that no weight is widened by two.
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(begin, min(begin + share, K), BLOCK_K):
        at = start + k
        w_NK = tl.load(w_rows + at[None, :], mask=real_n & (at < K)[None, :], other=0.0)
        x_KM = tl.load(x_columns + at[:, None], mask=real_m & (at < K)[:, None], other=0.0)
        y = tl.dot(w_NK.to(x_KM.dtype), x_KM, y, input_precision="ieee")

    if PARTS > 1:
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        partial += tile * PARTS * BLOCK_N * BLOCK_M
        tl.store(partial + part * BLOCK_N * BLOCK_M + cell, y)
        tl.debug_barrier()  # all threads have stored before one of them says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1
        tl.store(arrived + tile, 0, mask=last)
        real_m = (m < tl.where(last, num_rows, 0))[None, :]
        y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for number in range(PARTS):
            y += tl.load(partial + number * BLOCK_N * BLOCK_M + cell, mask=real_n & real_m, other=0.0)
    y *= tl.load(scale + n, mask=n < outputs, other=0.0)[:, None]
    if SQUARE:
        y = tl.where(y > 0, y * y, 0.0)
    real, target = real_n & real_m, m[None, :] * (n0 + n1 + n2) + base + n[:, None]
    if RESIDUAL:
        y += tl.load(residual + target, mask=real, other=0.0).to(tl.float32)
    if SOFTCAP:
        y = softcap * (2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0)
    tl.store(out + target, y.to(out.dtype.element_ty), mask=real)


@triton.jit
def _rotated(x, cos, sin, dim, eps, scale, DIM: tl.constexpr):
    """A head at x: rotated (cos and sin of DIM numbers, sin negative in the second half), of root mean square `scale`."""
    own = tl.load(x + dim).to(tl.float32)
    partner = tl.load(x + (dim + DIM // 2) % DIM).to(tl.float32)
    y = own * cos + partner * sin
    return y * (scale / tl.sqrt(tl.sum(y * y, axis=0) / DIM + eps))


@triton.jit
def _places(pages, begin, end, slots, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where positions from begin to end of a row are among the slots of all pages (BLOCK,); page 0 behind the end."""
    p = begin + tl.arange(0, BLOCK)
    slot = p % slots
    return tl.load(pages + slot // PAGE, mask=p < end, other=0).to(tl.int64) * PAGE + slot % PAGE


@triton.jit
def _tile(cache, places, begin, end, slot_stride, dim, BLOCK: tl.constexpr):
    """Keys or values (BLOCK, DIM) of positions from begin to end, zeros behind the end."""
    real = begin + tl.arange(0, BLOCK) < end
    return tl.load(cache + places[:, None] * slot_stride + dim[None, :], mask=real[:, None], other=0.0)


@triton.jit
def attend(
    q, k, v, keys, values, pages, positions, cos, sin, ids, table, gate_x, gate_w, sums, partial,
    qkv_stride, pages_stride, slot_stride, slots, window, table_stride, gate_x_stride, eps, qk_scale, gate_scale, bound,
    GROUP: tl.constexpr, DIM: tl.constexpr, GATE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query head of one row over one part of the row's keys; program (row, head, part), of two parts or more.

    Position p is in slot p % slots of the row, which is a slot of one of its pages. The last part is the new
    token's: its key is rotated and normalised here and written to its slot; with GATE > 0 its value gets gate_scale * sigmoid(gate_w x) of the value embedding of its id, x being
    the first GATE numbers of gate_x. The other parts read the older keys. Queries and keys have a fixed norm, so
    that no score exceeds `bound`, no maximum has to be looked for, and parts just add up.
    """
    row, head, part, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    kv_head, position = head // GROUP, tl.load(positions + row).to(tl.int32)
    dim, half = tl.arange(0, DIM), position * (DIM // 2)
    pages += row.to(tl.int64) * pages_stride
    keys += kv_head * DIM
    values += kv_head * DIM
    begin = tl.maximum(position - window, 0)
    share = tl.cdiv(tl.cdiv(position - begin, parts - 1), BLOCK) * BLOCK
    begin += part * share
    end = tl.minimum(begin + share, position)
    places = _places(pages, begin, end, slots, PAGE, BLOCK)
    k_BD = _tile(keys, places, begin, end, slot_stride, dim, BLOCK)
    v_BD = _tile(values, places, begin, end, slot_stride, dim, BLOCK)
    c = tl.load(cos + half + dim % (DIM // 2)).to(tl.float32)
    s = tl.load(sin + half + dim % (DIM // 2)).to(tl.float32)
    s = tl.where(dim < DIM // 2, s, -s)

    # exp2 is what the hardware has, so scores are in units of log2(e).
    q_scale = qk_scale * 1.4426950408889634 / tl.sqrt(1.0 * DIM)
    q_D = _rotated(q + row * qkv_stride + head * DIM, c, s, dim, eps, q_scale, DIM)
    totals, sums_BD = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(begin, end, BLOCK):
        places = _places(pages, start + BLOCK, end, slots, PAGE, BLOCK)
        next_k = _tile(keys, places, start + BLOCK, end, slot_stride, dim, BLOCK)
        next_v = _tile(values, places, start + BLOCK, end, slot_stride, dim, BLOCK)
        scores = tl.sum(k_BD.to(tl.float32) * q_D[None, :], axis=1)
        weights = tl.where(start + tl.arange(0, BLOCK) < end, tl.exp2(scores - bound), 0.0)
        totals += weights
        sums_BD += weights[:, None] * v_BD.to(tl.float32)
        k_BD, v_BD = next_k, next_v
    total, found = tl.sum(totals, axis=0), tl.sum(sums_BD, axis=0)

    if part == parts - 1:
        new = k + row * qkv_stride + kv_head * DIM
        key = _rotated(new, c, s, dim, eps, qk_scale, DIM).to(keys.dtype.element_ty)
        value = tl.load(v + row * qkv_stride + kv_head * DIM + dim).to(tl.float32)
        if GATE > 0:
            g = tl.arange(0, 32)
            x_G = tl.load(gate_x + row * gate_x_stride + g, mask=g < GATE, other=0.0).to(tl.float32)
            w_G = tl.load(gate_w + kv_head * GATE + g, mask=g < GATE, other=0.0).to(tl.float32)
            entry = table + tl.load(ids + row) * table_stride + kv_head * DIM + dim
            value += gate_scale * tl.sigmoid(tl.sum(x_G * w_G, axis=0)) * tl.load(entry).to(tl.float32)
        value = value.to(values.dtype.element_ty)
        if head % GROUP == 0:
            place = position % slots
            slot = (tl.load(pages + place // PAGE).to(tl.int64) * PAGE + place % PAGE) * slot_stride
            tl.store(keys + slot + dim, key)
            tl.store(values + slot + dim, value)
        weight = tl.exp2(tl.sum(key.to(tl.float32) * q_D, axis=0) - bound)
        total += weight
        found += weight * value.to(tl.float32)

    target = (row * tl.num_programs(1) + head) * parts + part
    tl.store(sums + target, total)
    tl.store(partial + target * DIM + dim, found)


@triton.jit
def combine(sums, partial, out, parts, DIM: tl.constexpr, MAX_PARTS: tl.constexpr):
    """Attention of one head of one row from its parts; program row * heads + head."""
    target, part, dim = tl.program_id(0), tl.arange(0, MAX_PARTS), tl.arange(0, DIM)
    real = part < parts
    rows = (target * parts + part)[:, None] * DIM + dim[None, :]
    total = tl.sum(tl.load(sums + target * parts + part, mask=real, other=0.0), axis=0)
    found = tl.sum(tl.load(partial + rows, mask=real[:, None], other=0.0), axis=0)
    tl.store(out + target * DIM + dim, (found / total).to(out.dtype.element_ty))


@triton.jit
def mix(x, x0, resid, skip, out, count, BLOCK: tl.constexpr):
    """out = resid * x + skip * x0, with both factors read from memory."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < count
    a, b = tl.load(x + i, mask=real).to(tl.float32), tl.load(x0 + i, mask=real).to(tl.float32)
    y = tl.load(resid).to(tl.float32) * a + tl.load(skip).to(tl.float32) * b
    tl.store(out + i, y.to(out.dtype.element_ty), mask=real)
