"""Block importance: softmax of a sample of query rows over the mean keys of all blocks, in two passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...importance import BLOCK_BIAS_CLAMP
from .storage import SIZES, Prepared, empty, head_strides, pair_pitch
from .tile import LOG2E, logits


@triton.jit(do_not_specialize=SIZES)
def _whole_bias_kernel(
    squares_ptr, variance_ptr, counts_ptr, bias_ptr, half_scale_squared, clamp, query_blocks, key_blocks, pitch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logit bias of a whole block in powers of two: log of its tokens plus the clamped second-order term.

    It is minus infinity in the columns that only pad a row to the pitch.
    """
    z = tl.program_id(2).to(tl.int64)
    offs_d = tl.arange(0, HEAD_DIM)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_in, j_in = i < query_blocks, j < key_blocks
    squares_ptr += z * query_blocks * HEAD_DIM
    variance_ptr += (z * 4 + 3) * key_blocks * HEAD_DIM
    squares = tl.load(squares_ptr + i[:, None] * HEAD_DIM + offs_d[None, :], mask=i_in[:, None], other=0.0)
    variance = tl.load(variance_ptr + j[None, :] * HEAD_DIM + offs_d[:, None], mask=j_in[None, :], other=0.0)
    counts = tl.load(counts_ptr + j, mask=j_in, other=1).to(tl.float32)
    bias = tl.minimum(tl.dot(squares, variance, input_precision=PRECISION) * half_scale_squared, clamp)
    bias = tl.where(j_in[None, :], bias * LOG2E + tl.log2(counts)[None, :], float("-inf"))
    offsets = z * query_blocks * pitch + i.to(tl.int64)[:, None] * pitch + j[None, :]
    tl.store(bias_ptr + offsets, bias, mask=i_in[:, None] & (j < pitch)[None, :])


@triton.jit
def _block_logits(
    q, keys_ptr, bias_ptr, bias_row, j, key_blocks, pitch, qk_scale,
    BLOCKS: tl.constexpr, SAMPLES: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the mean keys of blocks j for sampled rows ``[len(j), BLOCKS, SAMPLES]``, in powers of two."""
    offs_d = tl.arange(0, HEAD_DIM)
    bias = tl.load(bias_ptr + bias_row[None, :] + j[:, None], mask=(j < pitch)[:, None], other=float("-inf"))
    k = tl.load(keys_ptr + j[:, None] * HEAD_DIM + offs_d[None, :], mask=(j < key_blocks)[:, None], other=0.0)
    qk = logits(k, q, PRECISION)
    return tl.reshape(qk, [qk.shape[0], BLOCKS, SAMPLES]) * qk_scale + bias[:, :, None]


@triton.jit(do_not_specialize=SIZES)
def _importance_kernel(
    q_ptr, keys_ptr, tokens_ptr, bias_ptr, importance_ptr, qk_scale,
    stride_b, stride_h, stride_n, stride_d, heads, query_blocks, key_blocks, pitch, pyramid_rows,
    QUERY_BLOCK: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Keys are the rows of the logits and queries their columns: a query block's bias is then one number per row, and
    # the mean over its queries a sum within a row. Every place keeps a maximum and a sum of its own until the end.
    z = tl.program_id(1).to(tl.int64)
    SAMPLES: tl.constexpr = QUERY_BLOCK // STRIDE
    offs_m, offs_n, offs_d = tl.arange(0, BLOCKS * SAMPLES), tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    i = tl.program_id(0) * BLOCKS + offs_m // SAMPLES
    place = i * QUERY_BLOCK + (offs_m % SAMPLES) * STRIDE
    token = tl.load(tokens_ptr + place, mask=i < query_blocks, other=-1).to(tl.int64)
    q_ptr += (z // heads) * stride_b + (z % heads) * stride_h
    q = tl.load(q_ptr + token[:, None] * stride_n + offs_d[None, :] * stride_d, mask=(token >= 0)[:, None], other=0.0)
    keys_ptr += ((z + 1) * pyramid_rows - key_blocks) * HEAD_DIM  # the last rows: means of whole blocks
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    bias_ptr += z * query_blocks * pitch
    bias_row = tl.minimum(block, query_blocks - 1).to(tl.int64) * pitch

    m_i = tl.full([BLOCK_N, BLOCKS, SAMPLES], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_N, BLOCKS, SAMPLES], tl.float32)
    for start in range(0, key_blocks, BLOCK_N):
        qk = _block_logits(
            q, keys_ptr, bias_ptr, bias_row, start + offs_n, key_blocks, pitch, qk_scale,
            BLOCKS, SAMPLES, HEAD_DIM, PRECISION,
        )  # fmt: skip
        above = qk - m_i
        smaller = tl.exp2(-tl.abs(above))
        l_i = tl.where(above > 0, l_i * smaller + 1.0, l_i + smaller)
        m_i = tl.maximum(m_i, qk)
    m_row = tl.max(m_i, axis=0)
    log_sum = m_row + tl.log2(tl.sum(l_i * tl.exp2(m_i - m_row[None, :, :]), axis=0))

    filled = tl.reshape(token >= 0, [BLOCKS, SAMPLES])
    log_sum = tl.where(filled, log_sum, float("inf"))
    rows = tl.maximum(tl.sum(filled.to(tl.float32), axis=1), 1.0)
    importance_ptr += z * query_blocks * pitch
    for start in range(0, key_blocks, BLOCK_N):
        j = start + offs_n
        qk = _block_logits(
            q, keys_ptr, bias_ptr, bias_row, j, key_blocks, pitch, qk_scale, BLOCKS, SAMPLES, HEAD_DIM, PRECISION
        )
        p = tl.sum(tl.exp2(qk - log_sum[None, :, :]), axis=2) / rows[None, :]
        offsets = block.to(tl.int64)[None, :] * pitch + j[:, None]
        tl.store(importance_ptr + offsets, p, mask=(block < query_blocks)[None, :] & (j < key_blocks)[:, None])


def importance(prepared: Prepared) -> Tensor:
    """Estimated attention mass ``[B, H, query blocks, key blocks]``, fp32; rows sum to 1."""
    q, plan, queries, keys = prepared.q, prepared.plan, prepared.order.queries, prepared.order.keys
    batch, heads, _, head_dim = q.shape
    z = batch * heads
    pitch = pair_pitch(keys.blocks)
    bias = empty(q, z, queries.blocks, pitch, dtype=torch.float32)
    grid = (triton.cdiv(queries.blocks, 32), triton.cdiv(keys.blocks, 64), z)
    _whole_bias_kernel[grid](
        prepared.query_squares, prepared.key_variance, keys.counts, bias, 0.5 * prepared.scale**2, BLOCK_BIAS_CLAMP,
        queries.blocks, keys.blocks, pitch, BLOCK_M=32, BLOCK_N=64, HEAD_DIM=head_dim,
        PRECISION=plan.statistics_precision,
    )  # fmt: skip
    result = empty(q, z, queries.blocks, pitch, dtype=torch.float32)
    stride = prepared.config.importance_stride
    blocks = max(1, plan.importance_rows * stride // queries.size)
    _importance_kernel[(triton.cdiv(queries.blocks, blocks), z)](
        q, prepared.keys, queries.tokens, bias, result, prepared.scale * LOG2E.value, *head_strides(q), heads,
        queries.blocks, keys.blocks, pitch, prepared.rows.total,
        QUERY_BLOCK=queries.size, STRIDE=stride, BLOCKS=blocks, BLOCK_N=64, HEAD_DIM=head_dim,
        PRECISION=plan.precision, num_warps=plan.importance_warps, num_stages=3,
    )  # fmt: skip
    return result.view(batch, heads, queries.blocks, pitch)[..., : keys.blocks]
