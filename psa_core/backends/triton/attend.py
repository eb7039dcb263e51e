"""Sparse attention: one query block against its lists of key blocks, each at its level."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import attend_config, capability
from .importance import LOG2E
from .storage import COUNTS, SLOTS, Prepared, Selection, head_strides


@triton.jit
def _accumulate(acc, l_i, m_i, qk, v, PRECISION: tl.constexpr):
    """One step of the online softmax; logits ``[BLOCK_M, BLOCK_N]`` are in powers of two."""
    m_new = tl.maximum(m_i, tl.max(qk, axis=1))
    p = tl.exp2(qk - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, l_i, m_new


@triton.jit
def _attend_kernel(
    q_ptr, keys_ptr, values_ptr, out_ptr, query_tokens_ptr, key_tokens_ptr, indices_ptr, counts_ptr, bias_ptr, qk_scale,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_ob, stride_oh, stride_on, stride_od,
    heads, query_blocks, video_keys, places, last_count, pyramid_rows,
    first_row_2, first_row_4, first_row_8, first_row_whole,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COUNTS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Exact query blocks come last and attend to everything: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    z = tl.program_id(1).to(tl.int64)
    i = tile // (QUERY_BLOCK // BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    token = tl.load(query_tokens_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    q_ptr += (z // heads) * stride_qb + (z % heads) * stride_qh
    q = tl.load(q_ptr + token[:, None] * stride_qn + offs_d[None, :] * stride_qd, mask=(token >= 0)[:, None], other=0.0)
    keys_ptr += z * pyramid_rows * HEAD_DIM
    values_ptr += z * pyramid_rows * HEAD_DIM
    counts_ptr += (z * query_blocks + i) * COUNTS
    indices_ptr += (z * query_blocks + i) * video_keys
    bias_ptr += (z * query_blocks + i) * video_keys
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # Level 1, whole key blocks.
    exact = tl.load(counts_ptr)
    if KEY_BLOCK >= BLOCK_N:
        TILES: tl.constexpr = KEY_BLOCK // BLOCK_N
        for t in range(0, exact * TILES):
            block = tl.load(indices_ptr + t // TILES).to(tl.int64)
            rows = block * KEY_BLOCK + (t % TILES) * BLOCK_N + offs_n
            k = tl.load(keys_ptr + rows[None, :] * HEAD_DIM + offs_d[:, None])
            v = tl.load(values_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :])
            qk = tl.dot(q, k, input_precision=PRECISION) * qk_scale
            acc, l_i, m_i = _accumulate(acc, l_i, m_i, qk, v, PRECISION)
        gathered_exact = 0
    else:
        gathered_exact = exact

    # Pooled levels: groups of several blocks and levels fill one tile.
    listed = exact - gathered_exact
    end_1 = gathered_exact * KEY_BLOCK
    end_2 = end_1 + tl.load(counts_ptr + 1) * (KEY_BLOCK // 2)
    end_4 = end_2 + tl.load(counts_ptr + 2) * (KEY_BLOCK // 4)
    end_8 = end_4 + tl.load(counts_ptr + 3) * (KEY_BLOCK // 8)
    end = end_8 + tl.load(counts_ptr + 4)
    list_2 = listed + gathered_exact
    list_4 = list_2 + tl.load(counts_ptr + 1)
    list_8 = list_4 + tl.load(counts_ptr + 2)
    list_whole = list_8 + tl.load(counts_ptr + 3)
    for start in range(0, end, BLOCK_N):
        r = start + offs_n
        log_groups = tl.where(r < end_1, LOG_BLOCK, tl.where(r < end_2, LOG_BLOCK - 1, tl.where(r < end_4, LOG_BLOCK - 2, tl.where(r < end_8, LOG_BLOCK - 3, 0))))
        from_row = tl.where(r < end_1, 0, tl.where(r < end_2, end_1, tl.where(r < end_4, end_2, tl.where(r < end_8, end_4, end_8))))
        from_list = tl.where(r < end_1, listed, tl.where(r < end_2, list_2, tl.where(r < end_4, list_4, tl.where(r < end_8, list_8, list_whole))))
        first_row = tl.where(r < end_1, 0, tl.where(r < end_2, first_row_2, tl.where(r < end_4, first_row_4, tl.where(r < end_8, first_row_8, first_row_whole))))
        r_in = r < end
        at = r - from_row
        block = tl.load(indices_ptr + from_list + (at >> log_groups), mask=r_in, other=0)
        group = at & ((1 << log_groups) - 1)
        rows = (first_row + (block << log_groups) + group).to(tl.int64)
        k = tl.load(keys_ptr + rows[None, :] * HEAD_DIM + offs_d[:, None], mask=r_in[None, :], other=0.0)
        v = tl.load(values_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], mask=r_in[:, None], other=0.0)
        tokens = tl.where(block == video_keys - 1, last_count, KEY_BLOCK)
        size = KEY_BLOCK >> log_groups
        members = tl.minimum(tl.maximum(tokens - group * size, 0), size)
        bias = tl.load(bias_ptr + block, mask=r_in, other=0.0) * 1.4426950408889634 + tl.log2(members.to(tl.float32))
        bias = tl.where(r_in, bias, float("-inf"))
        qk = tl.dot(q, k, input_precision=PRECISION) * qk_scale + bias[None, :]
        acc, l_i, m_i = _accumulate(acc, l_i, m_i, qk, v, PRECISION)

    # The ragged last video block where it is exact, and exact key blocks: tiles with empty places.
    first_place = (video_keys - tl.load(counts_ptr + SLOTS)) * KEY_BLOCK
    for start in range(first_place, places, BLOCK_N):
        place = start + offs_n
        filled = tl.load(key_tokens_ptr + place, mask=place < places, other=-1) >= 0
        rows = place.to(tl.int64)
        k = tl.load(keys_ptr + rows[None, :] * HEAD_DIM + offs_d[:, None], mask=filled[None, :], other=0.0)
        v = tl.load(values_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], mask=filled[:, None], other=0.0)
        qk = tl.where(filled[None, :], tl.dot(q, k, input_precision=PRECISION) * qk_scale, float("-inf"))
        acc, l_i, m_i = _accumulate(acc, l_i, m_i, qk, v, PRECISION)

    out_ptr += (z // heads) * stride_ob + (z % heads) * stride_oh
    out = (acc / l_i[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token[:, None] * stride_on + offs_d[None, :] * stride_od, out, mask=(token >= 0)[:, None])


def attend(prepared: Prepared, selection: Selection, out: Tensor) -> None:
    """Write the attention output into ``out`` ``[B, H, N, D]``, in the order of the inputs."""
    q, rows, keys = prepared.q, prepared.order.queries, prepared.order.keys
    batch, heads, _, head_dim = q.shape
    tuned = attend_config(capability(q.device), q.dtype, head_dim, rows.size)
    first = prepared.layout.first
    _attend_kernel[(rows.blocks * (rows.size // tuned.block_m), batch * heads)](
        q, prepared.keys, prepared.values, out, rows.tokens, keys.tokens,
        selection.indices, selection.counts, selection.bias, prepared.scale * LOG2E,
        *head_strides(q), *head_strides(out), heads, rows.blocks, keys.video_blocks, keys.blocks * keys.size,
        keys.last_video_count, prepared.layout.rows, *first[1:],
        QUERY_BLOCK=rows.size, KEY_BLOCK=keys.size, LOG_BLOCK=keys.size.bit_length() - 1, HEAD_DIM=head_dim,
        BLOCK_M=tuned.block_m, BLOCK_N=tuned.block_n, COUNTS=COUNTS, SLOTS=SLOTS, PRECISION=tuned.precision,
        num_warps=tuned.num_warps, num_stages=tuned.num_stages,
    )  # fmt: skip
