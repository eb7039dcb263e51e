"""One pass over keys and values: order, centre, pool and take variances; and one over queries for their squares.

Every head may have an order of its own inside its key blocks (grouping.py); keys and values follow it alike.

Programs of neighbouring heads are launched side by side: in ComfyUI's memory layout they read neighbouring addresses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import PSAConfig
from ...ordering import BlockTable, TokenOrder
from .grouping import sort_by_content
from .plan import Plan
from .storage import ROWS_PER_MEAN, SIZES, Prepared, PyramidRows, empty, head_strides


@triton.jit(do_not_specialize=SIZES)
def _sum_rows_kernel(
    x_ptr, partial_ptr, stride_b, stride_h, stride_n, stride_d, heads, tokens,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    z, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x_ptr += (z // heads) * stride_b + (z % heads) * stride_h
    offs_d = tl.arange(0, HEAD_DIM)
    total = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for start in range(0, ROWS, BLOCK):
        rows = chunk * ROWS + start + tl.arange(0, BLOCK)
        pointers = x_ptr + rows[:, None] * stride_n + offs_d[None, :] * stride_d
        total += tl.load(pointers, mask=(rows < tokens)[:, None], other=0.0).to(tl.float32)
    tl.store(partial_ptr + (z * tl.num_programs(1) + chunk) * HEAD_DIM + offs_d, tl.sum(total, axis=0))


@triton.jit
def _merge(left, left_count, right, right_count):
    """Merge groups pairwise: means ``[R, D]``, counts ``[R]``, and the squared deviations that this adds ``[R, D]``."""
    count = left_count + right_count
    inverse = 1.0 / tl.maximum(count, 1.0)
    apart = left - right
    added = apart * apart * (left_count * right_count * inverse)[:, None]
    return left * (left_count * inverse)[:, None] + right * (right_count * inverse)[:, None], count, added


@triton.jit
def _load_every_eighth(
    x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block,
    PHASE: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Centred places PHASE, PHASE + 8, ... of a block ``[KEY_BLOCK / 8, D]``, which become level 1, and their fill."""
    offs_d = tl.arange(0, HEAD_DIM)
    place = block * KEY_BLOCK + tl.arange(0, KEY_BLOCK // 8) * 8 + PHASE
    token = tl.load(tokens_ptr + place).to(tl.int64)
    filled = token >= 0
    x = tl.load(x_ptr + token[:, None] * stride_n + offs_d[None, :] * stride_d, mask=filled[:, None], other=0.0)
    x = tl.where(filled[:, None], x.to(tl.float32) - mean[None, :], 0.0)
    tl.store(rows_ptr + place[:, None] * HEAD_DIM + offs_d[None, :], x.to(rows_ptr.dtype.element_ty))
    return x, filled.to(tl.float32)


@triton.jit
def _store_level(
    rows_ptr, first_row, block, x, is_video,
    PHASE: tl.constexpr, PHASES: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Store groups PHASE, PHASE + PHASES, ... of a block's pooled level."""
    groups = tl.arange(0, KEY_BLOCK // 8) * PHASES + PHASE
    rows = first_row + block * (KEY_BLOCK // 8 * PHASES) + groups
    offsets = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    if is_video:
        tl.store(rows_ptr + offsets, x.to(rows_ptr.dtype.element_ty))


@triton.jit
def _store_variance(variance_ptr, at, spread, tokens, HEAD_DIM: tl.constexpr, IS_KEY: tl.constexpr):
    variance = tl.sum(spread, axis=0) / tokens
    if IS_KEY:
        tl.store(variance_ptr + at * HEAD_DIM + tl.arange(0, HEAD_DIM), variance)
    else:
        tl.store(variance_ptr + at, tl.sum(variance, axis=0))


@triton.jit
def _store_parts(
    parts_ptr, variance_ptr, first, x, n, spread, PARTS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Store means and variances of a block's parts, each ROWS groups of eight tokens."""
    x, spread = tl.reshape(x, [PARTS, ROWS, HEAD_DIM]), tl.reshape(spread, [PARTS, ROWS, HEAD_DIM])
    n = tl.reshape(n, [PARTS, ROWS])
    tokens = tl.maximum(tl.sum(n, axis=1), 1.0)[:, None]
    mean = tl.sum(x * n[:, :, None], axis=1) / tokens
    apart = x - mean[:, None, :]
    variance = tl.sum(spread + apart * apart * n[:, :, None], axis=1) / tokens
    offsets = (first + tl.arange(0, PARTS))[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(parts_ptr + offsets, mean.to(parts_ptr.dtype.element_ty))
    tl.store(variance_ptr + offsets, variance)


@triton.jit(do_not_specialize=SIZES)
def _pyramid_kernel(
    x_ptr, mean_ptr, tokens_ptr, rows_ptr, variance_ptr, power_ptr, parts_ptr, part_variance_ptr,
    stride_b, stride_h, stride_n, stride_d, heads, places, key_blocks, video_keys, pyramid_rows,
    KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, POOLED: tl.constexpr, IS_KEY: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # The block is held as eight tiles of every eighth place, so that neighbours merge without moving between threads.
    z, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    is_video = block < video_keys
    first_row = key_blocks * KEY_BLOCK
    offs_d = tl.arange(0, HEAD_DIM)
    x_ptr += (z // heads) * stride_b + (z % heads) * stride_h
    tokens_ptr += z * places
    rows_ptr += z * pyramid_rows * HEAD_DIM
    mean = tl.zeros([HEAD_DIM], tl.float32)
    if IS_KEY:
        mean = tl.load(mean_ptr + z * HEAD_DIM + offs_d)
    x0, n0 = _load_every_eighth(x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block, 0, KEY_BLOCK, HEAD_DIM)
    x1, n1 = _load_every_eighth(x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block, 1, KEY_BLOCK, HEAD_DIM)
    x2, n2 = _load_every_eighth(x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block, 2, KEY_BLOCK, HEAD_DIM)
    x3, n3 = _load_every_eighth(x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block, 3, KEY_BLOCK, HEAD_DIM)
    x4, n4 = _load_every_eighth(x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block, 4, KEY_BLOCK, HEAD_DIM)
    x5, n5 = _load_every_eighth(x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block, 5, KEY_BLOCK, HEAD_DIM)
    x6, n6 = _load_every_eighth(x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block, 6, KEY_BLOCK, HEAD_DIM)
    x7, n7 = _load_every_eighth(x_ptr, mean, tokens_ptr, rows_ptr, stride_n, stride_d, block, 7, KEY_BLOCK, HEAD_DIM)
    tokens = tl.sum(n0 + n1 + n2 + n3 + n4 + n5 + n6 + n7, axis=0)
    if not IS_KEY:
        squares = x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3 + x4 * x4 + x5 * x5 + x6 * x6 + x7 * x7
        tl.store(power_ptr + z * key_blocks + block, tl.sum(tl.sum(squares, axis=1), axis=0))

    x0, n0, s0 = _merge(x0, n0, x1, n1)
    x2, n2, s2 = _merge(x2, n2, x3, n3)
    x4, n4, s4 = _merge(x4, n4, x5, n5)
    x6, n6, s6 = _merge(x6, n6, x7, n7)
    spread = s0 + s2 + s4 + s6
    _store_variance(variance_ptr, (z * 4 + 0) * key_blocks + block, spread, tokens, HEAD_DIM, IS_KEY)
    if POOLED & (KEY_BLOCK // 2):
        _store_level(rows_ptr, first_row, block, x0, is_video, 0, 4, KEY_BLOCK, HEAD_DIM)
        _store_level(rows_ptr, first_row, block, x2, is_video, 1, 4, KEY_BLOCK, HEAD_DIM)
        _store_level(rows_ptr, first_row, block, x4, is_video, 2, 4, KEY_BLOCK, HEAD_DIM)
        _store_level(rows_ptr, first_row, block, x6, is_video, 3, 4, KEY_BLOCK, HEAD_DIM)
        first_row += video_keys * (KEY_BLOCK // 2)

    x0, n0, s0 = _merge(x0, n0, x2, n2)
    x4, n4, s4 = _merge(x4, n4, x6, n6)
    spread += s0 + s4
    _store_variance(variance_ptr, (z * 4 + 1) * key_blocks + block, spread, tokens, HEAD_DIM, IS_KEY)
    if POOLED & (KEY_BLOCK // 4):
        _store_level(rows_ptr, first_row, block, x0, is_video, 0, 2, KEY_BLOCK, HEAD_DIM)
        _store_level(rows_ptr, first_row, block, x4, is_video, 1, 2, KEY_BLOCK, HEAD_DIM)
        first_row += video_keys * (KEY_BLOCK // 4)

    x0, n0, s0 = _merge(x0, n0, x4, n4)
    spread += s0
    _store_variance(variance_ptr, (z * 4 + 2) * key_blocks + block, spread, tokens, HEAD_DIM, IS_KEY)
    if POOLED & (KEY_BLOCK // 8):
        _store_level(rows_ptr, first_row, block, x0, is_video, 0, 1, KEY_BLOCK, HEAD_DIM)

    if IS_KEY:
        part = (z * key_blocks + block) * PARTS
        _store_parts(parts_ptr, part_variance_ptr, part, x0, n0, spread, PARTS, KEY_BLOCK // 8 // PARTS, HEAD_DIM)

    whole = tl.sum(x0 * n0[:, None], axis=0) / tokens
    apart = x0 - whole[None, :]
    spread += apart * apart * n0[:, None]
    _store_variance(variance_ptr, (z * 4 + 3) * key_blocks + block, spread, tokens, HEAD_DIM, IS_KEY)
    tl.store(rows_ptr + (pyramid_rows - key_blocks + block) * HEAD_DIM + offs_d, whole.to(rows_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def _query_squares_kernel(
    q_ptr, tokens_ptr, squares_ptr, stride_b, stride_h, stride_n, stride_d, heads,
    QUERY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    z, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, HEAD_DIM)
    token = tl.load(tokens_ptr + block * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)).to(tl.int64)
    filled = token >= 0
    q_ptr += (z // heads) * stride_b + (z % heads) * stride_h
    q = tl.load(q_ptr + token[:, None] * stride_n + offs_d[None, :] * stride_d, mask=filled[:, None], other=0.0)
    q = q.to(tl.float32)
    squares = tl.sum(q * q, axis=0) / tl.sum(filled.to(tl.float32), axis=0)
    tl.store(squares_ptr + (z * tl.num_programs(1) + block) * HEAD_DIM + offs_d, squares)


def prepare(q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> Prepared:
    """Order, centre and pool ``[B, H, N, D]`` keys and values; queries stay where they are."""
    key_tokens = sort_by_content(k, order.keys) if config.group_keys else order.keys.tokens
    return prepare_given(q, k, v, order, config, scale, key_tokens)


def prepare_given(
    q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float, key_tokens: Tensor
) -> Prepared:
    """The same with the token at every key place known ``[places]``, or for each head ``[Z, places]``, int32."""
    plan, rows = Plan.of(q, order), PyramidRows.of(order, config)
    mean = _mean_key(k)
    shape = q.shape[0] * q.shape[1], order.keys.blocks * config.importance_parts, q.shape[-1]
    parts, part_variance = empty(q, *shape, dtype=plan.rows_dtype), empty(q, *shape, dtype=torch.float32)
    keys, key_variance, _ = _build_pyramid(k, mean, key_tokens, order.keys, rows, plan, parts, part_variance)
    values, value_variance, power = _build_pyramid(v, None, key_tokens, order.keys, rows, plan)
    return Prepared(
        q=q,
        k=k,
        order=order,
        config=config,
        scale=scale,
        plan=plan,
        rows=rows,
        keys=keys,
        values=values,
        parts=parts,
        part_variance=part_variance,
        key_variance=key_variance,
        value_variance=value_variance,
        value_power=power.sum(-1) / q.shape[2],
        query_squares=_query_squares(q, order.queries),
    )


def _mean_key(k: Tensor) -> Tensor:
    """Mean key of each head ``[Z, D]``, fp32."""
    batch, heads, tokens, head_dim = k.shape
    chunks = triton.cdiv(tokens, ROWS_PER_MEAN)
    partial = empty(k, batch * heads, chunks, head_dim, dtype=torch.float32)
    _sum_rows_kernel[(batch * heads, chunks)](
        k, partial, *head_strides(k), heads, tokens, ROWS=ROWS_PER_MEAN, BLOCK=64, HEAD_DIM=head_dim
    )
    return partial.sum(1) / tokens


def _build_pyramid(
    x: Tensor,
    mean: Tensor | None,
    tokens: Tensor,
    table: BlockTable,
    rows: PyramidRows,
    plan: Plan,
    parts: Tensor | None = None,
    part_variance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of every level, their variances, and of values (no mean given) the sum of squares of every block."""
    batch, heads, _, head_dim = x.shape
    z, is_key = batch * heads, mean is not None
    pyramid = empty(x, z, rows.total, head_dim, dtype=plan.rows_dtype)
    variance = empty(x, z, 4, table.blocks, *([head_dim] if is_key else []), dtype=torch.float32)
    power = empty(x, z, table.blocks, dtype=torch.float32)
    _pyramid_kernel[(z, table.blocks)](
        x, mean, tokens, pyramid, variance, power, parts, part_variance,
        *head_strides(x), heads, tokens.stride(0) if tokens.dim() == 2 else 0,
        table.blocks, table.video_blocks, rows.total,
        KEY_BLOCK=table.size, HEAD_DIM=head_dim, POOLED=rows.pooled, IS_KEY=is_key,
        PARTS=1 if parts is None else parts.shape[1] // table.blocks, num_warps=2,
    )  # fmt: skip
    return pyramid, variance, power


def _query_squares(q: Tensor, table: BlockTable) -> Tensor:
    batch, heads, _, head_dim = q.shape
    squares = empty(q, batch * heads, table.blocks, head_dim, dtype=torch.float32)
    _query_squares_kernel[(batch * heads, table.blocks)](
        q, table.tokens, squares, *head_strides(q), heads, QUERY_BLOCK=table.size, HEAD_DIM=head_dim
    )
    return squares
