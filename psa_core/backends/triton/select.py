"""From importance to levels, and from levels to compact lists of key blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import level_code
from ...importance import LEVEL_BIAS_CLAMP
from ...levels import cap_levels, select_by_rank
from .storage import COUNTS, PADDED_ROWS, SIZES, SLOTS, Prepared, Selection, empty, head_strides, list_pitch
from .tile import LOG2E

NEVER = 2.0  # no cosine is above it


@triton.jit(do_not_specialize=SIZES)
def _level_kernel(
    importance_ptr, squares_ptr, key_variance_ptr, value_variance_ptr, power_ptr, codes_ptr, bias_ptr,
    scale_squared, weight, bias_clamp, query_blocks, video_rows, key_blocks, video_keys, last_count, importance_pitch,
    LOG_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, USED: tl.constexpr, CHOOSE: tl.constexpr,
    VARIANCE_TERM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Choose the level of every video pair (or take it from the codes) and note its second-order logit term.

    Bits of USED say which of the levels 2, 4, 8 and whole block there are.
    """
    z = tl.program_id(2).to(tl.int64)
    offs_d = tl.arange(0, HEAD_DIM)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_in, j_in = i < video_rows, j < video_keys
    both = i_in[:, None] & j_in[None, :]
    rows = (z * query_blocks + i)[:, None]
    squares = tl.load(squares_ptr + rows * HEAD_DIM + offs_d[None, :], mask=i_in[:, None], other=0.0)
    pair = rows * video_keys + j[None, :]
    bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if CHOOSE:
        mass = tl.load(importance_ptr + rows * importance_pitch + j[None, :], mask=both, other=0.0)
        mass = mass * mass / tl.load(power_ptr + z)
        tokens = tl.where(j == video_keys - 1, last_count, 1 << LOG_BLOCK)
        best = tl.full([BLOCK_M, BLOCK_N], weight, tl.float32)
        code = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        code = tl.load(codes_ptr + pair, mask=both, other=0).to(tl.int32)
    for slot in tl.static_range(4):
        log_group = LOG_BLOCK if slot == 3 else slot + 1
        if (USED >> slot) & 1:
            block = (z * 4 + slot) * key_blocks + j
            variance = tl.load(
                key_variance_ptr + block[None, :] * HEAD_DIM + offs_d[:, None], mask=j_in[None, :], other=0.0
            )
            logit_variance = tl.dot(squares, variance, input_precision=PRECISION) * scale_squared
            if CHOOSE:
                error = mass * logit_variance * tl.load(value_variance_ptr + block, mask=j_in, other=0.0)[None, :]
                groups = (tokens + ((1 << log_group) - 1)) >> log_group
                score = error + (weight * groups.to(tl.float32) / tokens.to(tl.float32))[None, :]
                here = (score < best) & (error < float("inf"))
                best = tl.where(here, score, best)
                code = tl.where(here, log_group, code)
            else:
                here = code == log_group
            if VARIANCE_TERM:
                bias = tl.where(here, tl.minimum(0.5 * logit_variance, bias_clamp), bias)
    if CHOOSE:
        tl.store(codes_ptr + pair, code.to(tl.uint8), mask=both)
    tl.store(bias_ptr + pair, bias, mask=both)


@triton.jit(do_not_specialize=SIZES)
def _similarity_kernel(
    k_ptr, tokens_ptr, limits_ptr, stride_b, stride_h, stride_n, stride_d, heads, video_keys, least2, least4, least8,
    KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Find the coarsest level at which one block's groups have alike first and last keys."""
    block, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k_ptr += (z // heads) * stride_b + (z % heads) * stride_h
    tokens_ptr += block * KEY_BLOCK
    limit = tl.zeros([], tl.int32)
    for log_group in tl.static_range(1, 4):
        group = tl.arange(0, KEY_BLOCK >> log_group) << log_group
        first = tl.load(tokens_ptr + group)
        last = first
        for place in tl.static_range(1, 1 << log_group):
            token = tl.load(tokens_ptr + group + place)
            last = tl.where(token >= 0, token, last)
        a = _load_keys(k_ptr, first, stride_n, stride_d, HEAD_DIM)
        b = _load_keys(k_ptr, last, stride_n, stride_d, HEAD_DIM)
        norms = tl.maximum(tl.sqrt(tl.sum(a * a, axis=1)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(b * b, axis=1)), 1e-8)
        filled = (first >= 0).to(tl.float32)
        similarity = tl.sum(filled * tl.sum(a * b, axis=1) / norms, axis=0) / tl.sum(filled, axis=0)
        least = least2 if log_group == 1 else (least4 if log_group == 2 else least8)
        limit = tl.where(similarity > least, log_group, limit)
    tl.store(limits_ptr + z * video_keys + block, limit.to(tl.uint8))


@triton.jit
def _load_keys(k_ptr, token, stride_n, stride_d, HEAD_DIM: tl.constexpr):
    """Keys of some tokens in fp32; zeros for the token -1."""
    offsets = token.to(tl.int64)[:, None] * stride_n + tl.arange(0, HEAD_DIM)[None, :] * stride_d
    return tl.load(k_ptr + offsets, mask=(token >= 0)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _one_of_each(codes_ptr, pair, start, listed_keys, coded_keys, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr):
    """Slots of the next key blocks ``[BLOCK]``, and a one in the 12 bits of each listed block's slot."""
    j = start + tl.arange(0, BLOCK)
    code = tl.load(codes_ptr + pair + j, mask=j < coded_keys, other=0).to(tl.int32)
    slot = tl.where(code == LOG_BLOCK, 4, code)
    is_listed = (slot <= 4) & (j < listed_keys)
    slot = tl.where(is_listed, slot, 0)
    return j, slot, is_listed, is_listed.to(tl.int64) << (12 * slot).to(tl.int64)


@triton.jit(do_not_specialize=SIZES)
def _list_kernel(
    codes_ptr, bias_ptr, indices_ptr, listed_bias_ptr, counts_ptr,
    query_blocks, video_rows, video_keys, last_count, pitch,
    LOG_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the key blocks of one query block, level after level. A query block of exact tokens takes all at level 1.

    Places in all five lists come from one running sum, which counts each level in 12 bits of its own.
    """
    row, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pair = (z * query_blocks + row) * video_keys
    indices_ptr += (z * query_blocks + row) * pitch
    listed_bias_ptr += (z * query_blocks + row) * pitch
    counts_ptr += (z * query_blocks + row) * COUNTS
    coded_keys = tl.where(row < video_rows, video_keys, 0)
    listed_keys = tl.where(last_count < 1 << LOG_BLOCK, video_keys - 1, video_keys)
    slots = tl.arange(0, 8)
    shifts = (12 * tl.minimum(slots, SLOTS - 1)).to(tl.int64)
    counts = tl.zeros([8], tl.int32)
    for start in range(0, listed_keys, BLOCK):
        _, _, _, ones = _one_of_each(codes_ptr, pair, start, listed_keys, coded_keys, BLOCK, LOG_BLOCK)
        counts += ((tl.sum(ones, axis=0) >> shifts) & 4095).to(tl.int32)
    counts = tl.where(slots < SLOTS, counts, 0)
    tl.store(counts_ptr + slots, counts, mask=slots < SLOTS)

    log_sizes = tl.where(slots == 4, LOG_BLOCK, tl.minimum(slots, LOG_BLOCK))
    per_tile = tl.maximum(PADDED_ROWS >> (LOG_BLOCK - log_sizes), 1)
    padded = (counts + per_tile - 1) // per_tile * per_tile
    first = tl.cumsum(padded, axis=0) - padded
    padding = (first + counts)[:, None] + tl.arange(0, PADDED_ROWS)[None, :]
    is_padding = (padding < (first + padded)[:, None]) & (slots < SLOTS)[:, None]
    tl.store(indices_ptr + padding, tl.zeros([8, PADDED_ROWS], tl.int32), mask=is_padding)
    tl.store(listed_bias_ptr + padding, tl.full([8, PADDED_ROWS], float("-inf"), tl.float32), mask=is_padding)
    for start in range(0, listed_keys, BLOCK):
        j, slot, is_listed, ones = _one_of_each(codes_ptr, pair, start, listed_keys, coded_keys, BLOCK, LOG_BLOCK)
        bias = tl.load(bias_ptr + pair + j, mask=is_listed & (j < coded_keys), other=0.0)
        before = (((tl.cumsum(ones, axis=0) - ones) >> (12 * slot).to(tl.int64)) & 4095).to(tl.int32)
        before += tl.sum(tl.where(slot[:, None] == slots[None, :], first[None, :], 0), axis=1)
        log_size = tl.where(slot == 4, LOG_BLOCK, slot)
        tl.store(indices_ptr + before, j, mask=is_listed)
        tl.store(listed_bias_ptr + before, bias * LOG2E + log_size, mask=is_listed)
        first += ((tl.sum(ones, axis=0) >> shifts) & 4095).to(tl.int32)

    # Groups of all listed blocks, and those of a ragged last one at its level.
    groups = tl.sum(counts << (LOG_BLOCK - log_sizes), axis=0)
    ragged = tl.full([], -1, tl.int32)
    if listed_keys < video_keys:
        code = tl.load(codes_ptr + pair + video_keys - 1, mask=coded_keys > 0, other=0).to(tl.int32)
        if code <= LOG_BLOCK:
            ragged = code
            groups += (last_count + (1 << code) - 1) >> code
        if ragged > 0:
            bias = tl.load(bias_ptr + pair + video_keys - 1)
            tl.store(listed_bias_ptr + pitch - 1, bias * LOG2E)
    tl.store(counts_ptr + SLOTS, ragged)
    tl.store(counts_ptr + SLOTS + 1, groups)


def select(prepared: Prepared, importance: Tensor) -> Selection:
    """Choose levels and list the key blocks of every query block."""
    if prepared.config.selection == "error":
        codes = empty(importance, *_pair_shape(prepared), dtype=torch.uint8)
        return _list_blocks(prepared, codes, _run_level_kernel(prepared, codes, importance))
    rows, keys = prepared.order.queries.video_blocks, prepared.order.keys.video_blocks
    codes = select_by_rank(importance[:, :, :rows, :keys], prepared.config)
    if prepared.config.similarity_caps is not None:
        codes = cap_levels(codes, _run_similarity_kernel(prepared))
    return select_given(prepared, codes)


def select_given(prepared: Prepared, codes: Tensor) -> Selection:
    """List the key blocks of levels that are known: codes ``[B, H, video query blocks, video key blocks]``, uint8."""
    padded = torch.zeros(_pair_shape(prepared), dtype=torch.uint8, device=codes.device)
    padded[:, : codes.shape[2]] = codes.flatten(0, 1)
    return _list_blocks(prepared, padded, _run_level_kernel(prepared, padded, None))


def count(prepared: Prepared, selection: Selection) -> tuple[Tensor, Tensor]:
    """Density ``[B, H]``, fp32, and number of video pairs at each level of the config ``[B, H, levels]``, int64."""
    rows, keys, config = prepared.order.queries, prepared.order.keys, prepared.config
    tokens = prepared.order.layout.tokens
    exact_tokens = tokens - (max(keys.video_blocks - 1, 0) * keys.size + keys.last_video_count) * (
        keys.video_blocks > 0
    )
    groups = (selection.counts[..., SLOTS.value + 1] + exact_tokens).double()
    density = (groups * rows.counts).sum(-1) / tokens**2

    video = selection.counts[:, : rows.video_blocks].long()
    ragged = video[..., SLOTS.value]
    pairs = dict(zip((1, 2, 4, 8, "block"), video[..., : SLOTS.value].sum(1).unbind(-1), strict=True))
    columns = [
        pairs[level] + (ragged == level_code(level, keys.size)).sum(1) for level in config.levels if level != "skip"
    ]
    if "skip" in config.levels:
        columns.append(rows.video_blocks * keys.video_blocks - torch.stack(columns).sum(0))
    shape = prepared.q.shape[:2]
    return density.float().view(shape), torch.stack(columns, dim=-1).view(*shape, -1)


def _pair_shape(prepared: Prepared) -> tuple[int, int, int]:
    rows, keys = prepared.order.queries, prepared.order.keys
    return prepared.keys.shape[0], rows.blocks, keys.video_blocks


def _run_similarity_kernel(prepared: Prepared) -> Tensor:
    """The coarsest level that each video key block's keys allow ``[B, H, video blocks]``, uint8."""
    k, keys = prepared.k, prepared.order.keys
    limits = empty(k, *k.shape[:2], keys.video_blocks, dtype=torch.uint8)
    caps = dict(prepared.config.similarity_caps or ())
    least2, least4, least8 = (float(caps.get(level, NEVER)) for level in (2, 4, 8))
    if keys.video_blocks:
        _similarity_kernel[(keys.video_blocks, k.shape[0] * k.shape[1])](
            k, keys.tokens, limits, *head_strides(k), k.shape[1], keys.video_blocks, least2, least4, least8,
            KEY_BLOCK=keys.size, HEAD_DIM=k.shape[-1], num_warps=4,
        )  # fmt: skip
    return limits


def _run_level_kernel(prepared: Prepared, codes: Tensor, importance: Tensor | None) -> Tensor:
    """Fill codes if there is an importance to choose by, and return the bias of every pair at its level."""
    config, rows, keys = prepared.config, prepared.order.queries, prepared.order.keys
    bias = empty(codes, *codes.shape, dtype=torch.float32)
    if rows.video_blocks == 0:
        return bias
    block_m, block_n = 64, 16
    grid = (triton.cdiv(rows.video_blocks, block_m), triton.cdiv(keys.video_blocks, block_n), codes.shape[0])
    _level_kernel[grid](
        importance, prepared.query_squares, prepared.key_variance, prepared.value_variance, prepared.value_power,
        codes, bias, prepared.scale**2, (config.error_weight or 0.0) / keys.video_blocks, LEVEL_BIAS_CLAMP,
        rows.blocks, rows.video_blocks, keys.blocks, keys.video_blocks, keys.last_video_count,
        0 if importance is None else importance.stride(2),
        LOG_BLOCK=keys.size.bit_length() - 1, HEAD_DIM=prepared.q.shape[-1],
        USED=sum(1 << slot for slot, level in enumerate((2, 4, 8, "block")) if level in config.levels),
        CHOOSE=importance is not None, VARIANCE_TERM=config.variance_term,
        BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=prepared.plan.statistics_precision, num_stages=1, num_warps=4,
    )  # fmt: skip
    return bias


def _list_blocks(prepared: Prepared, codes: Tensor, bias: Tensor) -> Selection:
    rows, keys = prepared.order.queries, prepared.order.keys
    pitch = list_pitch(keys.video_blocks)
    indices = empty(codes, *codes.shape[:2], pitch, dtype=torch.int32)
    listed_bias = empty(codes, *codes.shape[:2], pitch, dtype=torch.float32)
    counts = empty(codes, codes.shape[0], rows.blocks, COUNTS.value, dtype=torch.int32)
    _list_kernel[(rows.blocks, codes.shape[0])](
        codes, bias, indices, listed_bias, counts,
        rows.blocks, rows.video_blocks, keys.video_blocks, keys.last_video_count, pitch,
        LOG_BLOCK=keys.size.bit_length() - 1, BLOCK=256,
    )  # fmt: skip
    return Selection(indices, listed_bias, counts)
