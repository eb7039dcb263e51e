"""Block importance: softmax of a sample of query rows over the mean keys of all parts of blocks, in two passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...importance import importance_bias_clamp
from .storage import SIZES, Prepared, empty, head_strides, pair_pitch
from .tile import LOG2E, logits


@triton.jit(do_not_specialize=SIZES)
def _part_bias_kernel(
    squares_ptr, variance_ptr, counts_ptr, bias_ptr, half_scale_squared, clamp, query_blocks, parts, part_pitch,
    PARTS: tl.constexpr, KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logit bias of a part of a block in powers of two: log of its tokens plus the clamped second-order term.

    It is minus infinity for parts without a token, and in the columns that only pad a row to the pitch.
    """
    z = tl.program_id(2).to(tl.int64)
    offs_d = tl.arange(0, HEAD_DIM)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_in, j_in = i < query_blocks, j < parts
    squares_ptr += z * query_blocks * HEAD_DIM
    variance_ptr += z * parts * HEAD_DIM
    squares = tl.load(squares_ptr + i[:, None] * HEAD_DIM + offs_d[None, :], mask=i_in[:, None], other=0.0)
    variance = tl.load(variance_ptr + j[None, :] * HEAD_DIM + offs_d[:, None], mask=j_in[None, :], other=0.0)
    counts = tl.load(counts_ptr + j // PARTS, mask=j_in, other=1) - j % PARTS * (KEY_BLOCK // PARTS)
    counts = tl.minimum(tl.maximum(counts, 0), KEY_BLOCK // PARTS).to(tl.float32)
    bias = tl.minimum(tl.dot(squares, variance, input_precision=PRECISION) * half_scale_squared, clamp)
    bias = tl.where(j_in[None, :], bias * LOG2E + tl.log2(counts)[None, :], float("-inf"))
    offsets = z * query_blocks * part_pitch + i.to(tl.int64)[:, None] * part_pitch + j[None, :]
    tl.store(bias_ptr + offsets, bias, mask=i_in[:, None] & (j < part_pitch)[None, :])


@triton.jit
def _part_logits(
    q, keys_ptr, bias_ptr, bias_row, j, parts, part_pitch, qk_scale,
    BLOCKS: tl.constexpr, SAMPLES: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the mean keys of parts j for sampled rows ``[len(j), BLOCKS, SAMPLES]``, in powers of two."""
    offs_d = tl.arange(0, HEAD_DIM)
    bias = tl.load(bias_ptr + bias_row[None, :] + j[:, None], mask=(j < part_pitch)[:, None], other=float("-inf"))
    k = tl.load(keys_ptr + j[:, None] * HEAD_DIM + offs_d[None, :], mask=(j < parts)[:, None], other=0.0)
    qk = logits(k, q, PRECISION)
    return tl.reshape(qk, [qk.shape[0], BLOCKS, SAMPLES]) * qk_scale + bias[:, :, None]


@triton.jit(do_not_specialize=SIZES)
def _importance_kernel(
    q_ptr, keys_ptr, tokens_ptr, bias_ptr, importance_ptr, qk_scale,
    stride_b, stride_h, stride_n, stride_d, heads, query_blocks, key_blocks, pitch, parts, part_pitch,
    PARTS: tl.constexpr, QUERY_BLOCK: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
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
    keys_ptr += z * parts * HEAD_DIM
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    bias_ptr += z * query_blocks * part_pitch
    bias_row = tl.minimum(block, query_blocks - 1).to(tl.int64) * part_pitch

    m_i = tl.full([BLOCK_N, BLOCKS, SAMPLES], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_N, BLOCKS, SAMPLES], tl.float32)
    for start in range(0, parts, BLOCK_N):
        qk = _part_logits(
            q, keys_ptr, bias_ptr, bias_row, start + offs_n, parts, part_pitch, qk_scale,
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
    for start in range(0, parts, BLOCK_N):
        qk = _part_logits(
            q, keys_ptr, bias_ptr, bias_row, start + offs_n, parts, part_pitch, qk_scale,
            BLOCKS, SAMPLES, HEAD_DIM, PRECISION,
        )  # fmt: skip
        p = tl.sum(tl.exp2(qk - log_sum[None, :, :]), axis=2) / rows[None, :]
        p = tl.sum(tl.reshape(p, [BLOCK_N // PARTS, PARTS, BLOCKS]), axis=1)
        j = start // PARTS + tl.arange(0, BLOCK_N // PARTS)
        offsets = block.to(tl.int64)[None, :] * pitch + j[:, None]
        tl.store(importance_ptr + offsets, p, mask=(block < query_blocks)[None, :] & (j < key_blocks)[:, None])


def importance(prepared: Prepared) -> Tensor:
    """Estimated attention mass ``[B, H, query blocks, key blocks]``, fp32; rows sum to 1."""
    q, plan, queries, keys = prepared.q, prepared.plan, prepared.order.queries, prepared.order.keys
    batch, heads, _, head_dim = q.shape
    z = batch * heads
    parts, in_block = prepared.parts.shape[1], prepared.config.importance_parts
    pitch, part_pitch = pair_pitch(keys.blocks), pair_pitch(parts)
    bias = empty(q, z, queries.blocks, part_pitch, dtype=torch.float32)
    grid = (triton.cdiv(queries.blocks, 32), triton.cdiv(parts, 64), z)
    _part_bias_kernel[grid](
        prepared.query_squares, prepared.part_variance, keys.counts, bias, 0.5 * prepared.scale**2,
        importance_bias_clamp(in_block), queries.blocks, parts, part_pitch,
        PARTS=in_block, KEY_BLOCK=keys.size, BLOCK_M=32, BLOCK_N=64, HEAD_DIM=head_dim,
        PRECISION=plan.statistics_precision,
    )  # fmt: skip
    result = empty(q, z, queries.blocks, pitch, dtype=torch.float32)
    stride = prepared.config.importance_stride
    blocks = max(1, plan.importance_rows * stride // queries.size)
    _importance_kernel[(triton.cdiv(queries.blocks, blocks), z)](
        q, prepared.parts, queries.tokens, bias, result, prepared.scale * LOG2E.value, *head_strides(q), heads,
        queries.blocks, keys.blocks, pitch, parts, part_pitch, PARTS=in_block,
        QUERY_BLOCK=queries.size, STRIDE=stride, BLOCKS=blocks, BLOCK_N=64, HEAD_DIM=head_dim,
        PRECISION=plan.precision, num_warps=plan.importance_warps, num_stages=3,
    )  # fmt: skip
    return result.view(batch, heads, queries.blocks, pitch)[..., : keys.blocks]
