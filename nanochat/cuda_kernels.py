# pyright: reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""Triton kernels of generation: a matrix times one row or some, attention of one new token and of prompts, small sums.

One token at a time, a step is bound by how fast weights and keys come out of memory, and by how many kernels have
to be started. So what lies between two reads of memory is done by the kernel that reads: norms, rotations,
squares, residuals, writing the new key. All loads of a program come before its first sum, or it would wait for memory
twice. With OVERLAP a kernel begins while the one in front still runs (programmatic dependent launch, compute
capability 9.0): it asks for weights, keys and values, which no kernel of the step writes, and waits only then.
Arithmetic is fp32. Imported only where Triton is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def matrix_row(
    x, w0, w1, w2, s0, s1, s2, residual, out, n0, n1, num_outputs, eps, softcap,
    K: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, SQUARE: tl.constexpr, RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = f(W x) for one row x of K numbers and W (num_outputs, K), each program BLOCK_N outputs.

    PARTS = 3: W is w0, w1 and w2 below each other, the first two of n0 and n1 rows (multiples of BLOCK_N).
    NORM: x is divided by its root mean square, which may as well happen after the product. SCALED: int8 or e4m3
    weights with a factor per output. f: the square of what is positive, a residual to add, or softcap * tanh(y /
    softcap).
    """
    if OVERLAP:
        gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK_N
    w, scale, base = w0, s0, first * 0
    if PARTS == 3:
        if first >= n0 + n1:
            w, scale, base = w2, s2, n0 + n1
        elif first >= n0:
            w, scale, base = w1, s1, n0
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    real = first + n < num_outputs
    rows = w + (first - base + n).to(tl.int64)[:, None] * K
    w_pieces = ()
    for begin in tl.static_range(0, K, BLOCK_K):
        real_NK = real[:, None] & (begin + k < K)[None, :]
        w_pieces += (tl.load(rows + (begin + k)[None, :], mask=real_NK, other=0.0),)
    if SCALED:
        scale_N = tl.load(scale + first - base + n, mask=real, other=0.0)
    if OVERLAP:
        gdc_wait()
    if RESIDUAL:
        residual_N = tl.load(residual + first + n, mask=real, other=0.0).to(tl.float32)
    y_NK, squares_K = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        x_K = tl.load(x + begin + k, mask=begin + k < K, other=0.0).to(tl.float32)
        y_NK += w_pieces[begin // BLOCK_K].to(tl.float32) * x_K[None, :]
        squares_K += x_K * x_K
    y = tl.sum(y_NK, axis=1)
    if SCALED:
        y *= scale_N
    if NORM:
        y *= 1.0 / tl.sqrt(tl.sum(squares_K, axis=0) / K + eps)
    if SQUARE:
        y = tl.where(y > 0, y * y, 0.0)
    if RESIDUAL:
        y += residual_N
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
def _turned(own, partner, cos, sin, eps, scale, DIM: tl.constexpr, AXIS: tl.constexpr):
    """Heads rotated, with a root mean square of `scale`; axis AXIS has their DIM numbers.

    partner: the numbers DIM // 2 further on, in a cycle; sin: negative in the second half.
    """
    y = own.to(tl.float32) * cos + partner.to(tl.float32) * sin
    total = tl.sum(y * y, axis=AXIS)
    if AXIS == 1:
        total = total[:, None]
    return y * (scale / tl.sqrt(total / DIM + eps))


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
    q, k, v, keys, values, pages, positions, cos, sin, ids, table, gate_x, gate_w, sums, partial, arrived, out,
    qkv_stride, pages_stride, slot_stride, slots, window, table_stride, gate_x_stride, eps, qk_scale, gate_scale, bound,
    GROUP: tl.constexpr, DIM: tl.constexpr, GATE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query head of one row over one part of the row's keys; program (row, head, part) of at most PARTS (2^n) parts.

    Position p is in slot p % slots of the row, which is a slot of one of its pages. The last part also has the new
    token: its key is rotated and normalised here and written to its slot; with GATE > 0 its value gets gate_scale *
    sigmoid(gate_w x) of the value embedding of its id, x being the first GATE numbers of gate_x. Queries and keys have
    a fixed norm, so that no score exceeds `bound`, no maximum has to be looked for, and parts just add up: the part of
    a head that comes last does that; `arrived` (rows * heads,) counts them and is zero before and after.
    """
    if OVERLAP:
        gdc_launch_dependents()
    row, head, part, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    kv_head, position = head // GROUP, tl.load(positions + row).to(tl.int32)
    dim, half = tl.arange(0, DIM), position * (DIM // 2)
    partner, is_new = (dim + DIM // 2) % DIM, dim * 0 + part == parts - 1
    pages += row.to(tl.int64) * pages_stride
    keys += kv_head * DIM
    values += kv_head * DIM
    begin = tl.maximum(position - window, 0)
    share = tl.cdiv(tl.cdiv(position - begin, parts), BLOCK) * BLOCK
    begin += part * share
    end = tl.minimum(begin + share, position)
    places = _places(pages, begin, end, slots, PAGE, BLOCK)
    k_BD = _tile(keys, places, begin, end, slot_stride, dim, BLOCK)
    v_BD = _tile(values, places, begin, end, slot_stride, dim, BLOCK)
    c = tl.load(cos + half + dim % (DIM // 2)).to(tl.float32)
    s = tl.load(sin + half + dim % (DIM // 2)).to(tl.float32)
    s = tl.where(dim < DIM // 2, s, -s)
    if OVERLAP:
        gdc_wait()
    new = row * qkv_stride + kv_head * DIM
    own_q = row * qkv_stride + head * DIM
    q_own, q_partner = tl.load(q + own_q + dim), tl.load(q + own_q + partner)
    k_own = tl.load(k + new + dim, mask=is_new, other=0.0)
    k_partner = tl.load(k + new + partner, mask=is_new, other=0.0)
    value = tl.load(v + new + dim, mask=is_new, other=0.0).to(tl.float32)
    if GATE > 0:
        g = tl.arange(0, 32)
        x_G = tl.load(gate_x + row * gate_x_stride + g, mask=g < GATE, other=0.0).to(tl.float32)
        w_G = tl.load(gate_w + kv_head * GATE + g, mask=g < GATE, other=0.0).to(tl.float32)
        entry = table + tl.load(ids + row) * table_stride + kv_head * DIM + dim
        embed = tl.load(entry, mask=is_new, other=0.0).to(tl.float32)

    # exp2 is what the hardware has, so scores are in units of log2(e).
    q_D = _turned(q_own, q_partner, c, s, eps, qk_scale * 1.4426950408889634 / tl.sqrt(1.0 * DIM), DIM, 0)
    totals, sums_BD = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, DIM], tl.float32)
    for start in range(begin, end, BLOCK):
        scores = tl.sum(k_BD.to(tl.float32) * q_D[None, :], axis=1)
        weights = tl.where(start + tl.arange(0, BLOCK) < end, tl.exp2(scores - bound), 0.0)
        totals += weights
        sums_BD += weights[:, None] * v_BD.to(tl.float32)
        places = _places(pages, start + BLOCK, end, slots, PAGE, BLOCK)
        k_BD = _tile(keys, places, start + BLOCK, end, slot_stride, dim, BLOCK)
        v_BD = _tile(values, places, start + BLOCK, end, slot_stride, dim, BLOCK)
    total, found_D = tl.sum(totals, axis=0), tl.sum(sums_BD, axis=0)

    if part == parts - 1:
        key_D = _turned(k_own, k_partner, c, s, eps, qk_scale, DIM, 0).to(keys.dtype.element_ty)
        if GATE > 0:
            value += gate_scale * tl.sigmoid(tl.sum(x_G * w_G, axis=0)) * embed
        value_D = value.to(values.dtype.element_ty)
        if head % GROUP == 0:
            place = position % slots
            slot = (tl.load(pages + place // PAGE).to(tl.int64) * PAGE + place % PAGE) * slot_stride
            tl.store(keys + slot + dim, key_D)
            tl.store(values + slot + dim, value_D)
        weight = tl.exp2(tl.sum(key_D.to(tl.float32) * q_D, axis=0) - bound)
        total += weight
        found_D += weight * value_D.to(tl.float32)

    target = row * tl.num_programs(1) + head
    if PARTS == 1:
        tl.store(out + target * DIM + dim, (found_D / total).to(out.dtype.element_ty))
    else:
        tl.store(sums + target * parts + part, total)
        tl.store(partial + (target * parts + part) * DIM + dim, found_D)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived + target, 1, sem="acq_rel") == parts - 1:
            tl.store(arrived + target, 0)
            p = target * parts + tl.arange(0, PARTS)
            real = tl.arange(0, PARTS) < parts
            total = tl.sum(tl.load(sums + p, mask=real, other=0.0), axis=0)
            found_PD = tl.load(partial + p[:, None] * DIM + dim[None, :], mask=real[:, None], other=0.0)
            tl.store(out + target * DIM + dim, (tl.sum(found_PD, axis=0) / total).to(out.dtype.element_ty))


@triton.jit
def place(
    qkv, queries, keys, values, pages, rows, positions, cos, sin, ids, table, gate_x, gate_w,
    qkv_stride, pages_stride, slot_stride, slots, table_stride, gate_x_stride, eps, qk_scale, gate_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, GATE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token of a prompt: its queries, rotated and normalised, to `queries` (tokens, HEADS * DIM), its keys and values to their slot.

    As `attend` does it for a new token; token t is at positions[t] of row rows[t] of pages. BLOCK_Q >= HEADS, BLOCK_K >= KV_HEADS.
    """
    token = tl.program_id(0).to(tl.int64)
    row, position = tl.load(rows + token).to(tl.int64), tl.load(positions + token)
    head, kv_head, dim = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[:, None], tl.arange(0, DIM)
    real_q, real_k = head < HEADS, kv_head < KV_HEADS
    partner, half = (dim + DIM // 2) % DIM, position * (DIM // 2)
    q, k = qkv + token * qkv_stride + head * DIM, qkv + token * qkv_stride + (HEADS + kv_head) * DIM
    q_own = tl.load(q + dim[None, :], mask=real_q, other=0.0)
    q_partner = tl.load(q + partner[None, :], mask=real_q, other=0.0)
    k_own = tl.load(k + dim[None, :], mask=real_k, other=0.0)
    k_partner = tl.load(k + partner[None, :], mask=real_k, other=0.0)
    value = tl.load(k + KV_HEADS * DIM + dim[None, :], mask=real_k, other=0.0).to(tl.float32)
    slot = position % slots
    slot = tl.load(pages + row * pages_stride + slot // PAGE).to(tl.int64) * PAGE + slot % PAGE
    c = tl.load(cos + half + dim % (DIM // 2)).to(tl.float32)[None, :]
    s = tl.load(sin + half + dim % (DIM // 2)).to(tl.float32)
    s = tl.where(dim < DIM // 2, s, -s)[None, :]
    if GATE > 0:
        g = tl.arange(0, 32)[None, :]
        x_G = tl.load(gate_x + token * gate_x_stride + g, mask=g < GATE, other=0.0).to(tl.float32)
        w_KG = tl.load(gate_w + kv_head * GATE + g, mask=real_k & (g < GATE), other=0.0).to(tl.float32)
        entry = table + tl.load(ids + token) * table_stride + kv_head * DIM + dim[None, :]
        embed = tl.load(entry, mask=real_k, other=0.0).to(tl.float32)
        value += gate_scale * tl.sigmoid(tl.sum(x_G * w_KG, axis=1))[:, None] * embed
    q_HD = _turned(q_own, q_partner, c, s, eps, qk_scale, DIM, 1).to(queries.dtype.element_ty)
    k_HD = _turned(k_own, k_partner, c, s, eps, qk_scale, DIM, 1).to(keys.dtype.element_ty)
    tl.store(queries + (token * HEADS + head) * DIM + dim[None, :], q_HD, mask=real_q)
    target = slot * slot_stride + kv_head * DIM + dim[None, :]
    tl.store(keys + target, k_HD, mask=real_k)
    tl.store(values + target, value.to(values.dtype.element_ty), mask=real_k)


@triton.jit
def attend_prompt(
    queries, keys, values, pages, tiles, out, pages_stride, slot_stride, slots, window, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of some consecutive tokens of one row and one head, whose keys are in their slots; program (tile, head).

    tiles (n, 4): row of pages, first token, its position, number of tokens (at most BLOCK_M). scale: of scores, times
    log2(e). out (tokens, HEADS * DIM). Softmax as in Flash Attention (Dao et al. 2022, arXiv 2205.14135).
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    row, token = tl.load(tiles + 4 * tile).to(tl.int64), tl.load(tiles + 4 * tile + 1).to(tl.int64)
    position, count = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    m, n, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    own = (token + m[:, None]) * HEADS * DIM + head * DIM + dim[None, :]
    real = (m < count)[:, None]
    q_MD = tl.load(queries + own, mask=real, other=0.0)
    pages += row * pages_stride
    keys += head // GROUP * DIM
    values += head // GROUP * DIM
    at, end = position + m, position + count
    largest, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    y_MD = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(tl.maximum(position - window, 0) // BLOCK_N * BLOCK_N, end, BLOCK_N):
        p = start + n
        places = _places(pages, start, end, slots, PAGE, BLOCK_N)
        k_ND = _tile(keys, places, start, end, slot_stride, dim, BLOCK_N)
        v_ND = _tile(values, places, start, end, slot_stride, dim, BLOCK_N)
        scores = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        seen = (p[None, :] <= at[:, None]) & (at[:, None] - p[None, :] <= window)
        scores = tl.where(seen, scores, -1e30)
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        largest, total = larger, total * shrink + tl.sum(weights, axis=1)
        y_MD = tl.dot(weights.to(v_ND.dtype), v_ND, y_MD * shrink[:, None], input_precision="ieee")
    tl.store(out + own, (y_MD / total[:, None]).to(out.dtype.element_ty), mask=real)


@triton.jit
def square(x, count, BLOCK: tl.constexpr):
    """x = max(x, 0) ** 2, in place."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(x + i, tl.where(y > 0, y * y, 0.0).to(x.dtype.element_ty), mask=i < count)


@triton.jit
def mix(x, x0, resid, skip, out, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """out = resid * x + skip * x0, with both factors read from memory."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < count
    a, b = tl.load(x + i, mask=real).to(tl.float32), tl.load(x0 + i, mask=real).to(tl.float32)
    y = tl.load(resid).to(tl.float32) * a + tl.load(skip).to(tl.float32) * b
    tl.store(out + i, y.to(out.dtype.element_ty), mask=real)
