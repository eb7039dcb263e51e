"""Sparse attention: one query block against its lists of key blocks, each at its level."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

from .storage import COUNTS, PADDED_ROWS, SIZES, SLOTS, Prepared, Selection, head_strides
from .tile import LOG2E, attend_to_tile, logits

# The softmax is the same whatever is subtracted from a row's logits, as long as nothing overflows or vanishes. So the
# first pass subtracts the largest logit of a few neighbouring keys and never rescales; where that was too far from
# the row's true maximum, which its sum of weights shows, the query block is done again with the online softmax.
LEAST_SUM = tl.constexpr(2.0**-4)
GREATEST_SUM = tl.constexpr(2.0**64)
FEW_BLOCKS = tl.constexpr(4)

# In every loop the indices of the next tile are read with this one: keys and values whose address is known early are
# fetched while earlier tiles are multiplied.


@triton.jit
def _attend_to_whole_blocks(
    acc, l_i, m_i, q, keys_ptr, values_ptr, keys_tiles, values_tiles, head_row, indices_ptr, count, qk_scale,
    KEY_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the list of level 1: whole key blocks, through descriptors of their tiles where there are any."""
    PER_BLOCK: tl.constexpr = KEY_BLOCK // BLOCK_N
    HEAD_DIM: tl.constexpr = q.shape[1]
    in_tile = tl.arange(0, BLOCK_N)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    no_bias = tl.zeros([BLOCK_N], tl.float32)
    tiles = count * PER_BLOCK
    upcoming = tl.load(indices_ptr, mask=tiles > 0, other=0)
    for t in tl.range(0, tiles, num_stages=STAGES):
        row = upcoming * KEY_BLOCK + t % PER_BLOCK * BLOCK_N
        upcoming = tl.load(indices_ptr + tl.minimum(t + 1, tiles - 1) // PER_BLOCK)
        if keys_tiles is None:
            offset = row.to(tl.int64) * HEAD_DIM
            k, v = tl.load(keys_ptr + offset + in_tile), tl.load(values_ptr + offset + in_tile)
        else:
            k, v = keys_tiles.load([head_row + row, 0]), values_tiles.load([head_row + row, 0])
        acc, l_i, m_i = attend_to_tile(acc, l_i, m_i, q, k, v, no_bias, qk_scale, False, False, PRECISION)
    return acc, l_i


@triton.jit
def _read_few(pointer, PER_TILE: tl.constexpr):
    """Up to four neighbouring entries; the last of them stands for those beyond."""
    a = tl.load(pointer)
    b = tl.load(pointer + 1) if PER_TILE >= 2 else a
    c = tl.load(pointer + 2) if PER_TILE >= 4 else b
    d = tl.load(pointer + 3) if PER_TILE >= 4 else c
    return a, b, c, d


@triton.jit
def _spread_few(a, b, c, d, offs_n, GROUPS: tl.constexpr, PER_TILE: tl.constexpr):
    """Entries of up to four blocks, over the rows ``[BLOCK_N]`` of a tile that the blocks' groups fill."""
    if PER_TILE == 2:
        spread = tl.where(offs_n < GROUPS, a, b)
    else:
        first, second = tl.where(offs_n < GROUPS, a, b), tl.where(offs_n < 3 * GROUPS, c, d)
        spread = tl.where(offs_n < 2 * GROUPS, first, second)
    return spread


@triton.jit
def _attend_to_few(
    acc, l_i, m_i, q, keys_ptr, values_ptr, indices_ptr, bias_ptr, count, first_row, qk_scale,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the list of a level of which one, two or four blocks fill a tile, or one block fills several."""
    PER_TILE: tl.constexpr = BLOCK_N // GROUPS if BLOCK_N > GROUPS else 1
    PARTS: tl.constexpr = GROUPS // BLOCK_N if GROUPS > BLOCK_N else 1
    HEAD_DIM: tl.constexpr = q.shape[1]
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    in_tile = (offs_n % GROUPS)[:, None] * HEAD_DIM + offs_d[None, :]
    no_bias = tl.zeros([BLOCK_N], tl.float32)
    tiles = (count + PER_TILE - 1) // PER_TILE * PARTS
    i0, i1, i2, i3 = _read_few(indices_ptr, PER_TILE)
    b0, b1, b2, b3 = _read_few(bias_ptr, PER_TILE)
    for t in tl.range(0, tiles):
        if PER_TILE == 1:
            row, bias = i0 * GROUPS + t % PARTS * BLOCK_N, no_bias
            offsets = (first_row + row).to(tl.int64) * HEAD_DIM + in_tile
            shifted = m_i - b0
        else:
            row = _spread_few(i0, i1, i2, i3, offs_n, GROUPS, PER_TILE) * GROUPS
            bias = _spread_few(b0, b1, b2, b3, offs_n, GROUPS, PER_TILE)
            offsets = (first_row + row).to(tl.int64)[:, None] * HEAD_DIM + in_tile
            shifted = m_i
        entry = (t + 1) // PARTS * PER_TILE
        i0, i1, i2, i3 = _read_few(indices_ptr + entry, PER_TILE)
        b0, b1, b2, b3 = _read_few(bias_ptr + entry, PER_TILE)
        k, v = tl.load(keys_ptr + offsets), tl.load(values_ptr + offsets)
        acc, l_i, shifted = attend_to_tile(acc, l_i, shifted, q, k, v, bias, qk_scale, PER_TILE > 1, False, PRECISION)
    return acc, l_i


@triton.jit
def _attend_to_many(
    acc, l_i, m_i, q, keys_ptr, values_ptr, indices_ptr, bias_ptr, count, first_row, log_groups, qk_scale,
    BLOCK_N: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the list of any level, whose blocks have ``2^log_groups`` rows: those of several fill a tile."""
    HEAD_DIM: tl.constexpr = q.shape[1]
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    within = (1 << log_groups) - 1
    entry = offs_n >> log_groups
    next_block = tl.load(indices_ptr + entry)
    next_bias = tl.load(bias_ptr + entry)
    for start in tl.range(0, count << log_groups, BLOCK_N):
        block, bias = next_block, next_bias
        entry = (start + BLOCK_N + offs_n) >> log_groups
        next_block = tl.load(indices_ptr + entry)
        next_bias = tl.load(bias_ptr + entry)
        rows = first_row + (block << log_groups) + ((start + offs_n) & within)
        offsets = rows.to(tl.int64)[:, None] * HEAD_DIM + offs_d[None, :]
        k, v = tl.load(keys_ptr + offsets), tl.load(values_ptr + offsets)
        acc, l_i, m_i = attend_to_tile(acc, l_i, m_i, q, k, v, bias, qk_scale, True, ONLINE, PRECISION)
    return acc, l_i, m_i


@triton.jit
def _attend_to_ragged_and_exact(
    acc, l_i, m_i, q, keys_ptr, values_ptr, key_tokens_ptr, log_size, ragged_first, ragged_rows, ragged_bias,
    last_count, exact_first, places, qk_scale, BLOCK_N: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to a ragged last video block at its level, then to exact key blocks: to what has empty places."""
    HEAD_DIM: tl.constexpr = q.shape[1]
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    for start in range(0, ragged_rows + places - exact_first, BLOCK_N):
        r = start + offs_n
        place = exact_first + r - ragged_rows
        is_exact = (r >= ragged_rows) & (place < places)
        filled = tl.load(key_tokens_ptr + place, mask=is_exact, other=-1) >= 0
        size = 1 << tl.maximum(log_size, 0)
        members = tl.minimum(tl.maximum(last_count - r * size, 0), size).to(tl.float32)
        bias = tl.where(r < ragged_rows, tl.log2(members) + ragged_bias, tl.where(filled, 0.0, float("-inf")))
        rows = tl.where(r < ragged_rows, ragged_first + r, tl.minimum(place, places - 1)).to(tl.int64)
        offsets = rows[:, None] * HEAD_DIM + offs_d[None, :]
        k, v = tl.load(keys_ptr + offsets), tl.load(values_ptr + offsets)
        acc, l_i, m_i = attend_to_tile(acc, l_i, m_i, q, k, v, bias, qk_scale, True, ONLINE, PRECISION)
    return acc, l_i


@triton.jit
def _first_row(log_groups, pooled, video_keys, places, LOG_BLOCK: tl.constexpr):
    """First row of the level with ``2^log_groups`` rows a block: after all places and the groups of finer levels."""
    finer = pooled >> (log_groups + 1) << (log_groups + 1)
    return tl.where(log_groups == LOG_BLOCK, 0, places + video_keys * finer)


@triton.jit
def _end_of_list(count, log_groups):
    """Places of a level's list that has count blocks of ``2^log_groups`` rows, with what fills up its last tile."""
    per_tile = tl.maximum(PADDED_ROWS >> log_groups, 1)
    return (count + per_tile - 1) // per_tile * per_tile


@triton.jit
def _attend_to_lists(
    q, m_i, keys_ptr, values_ptr, keys_tiles, values_tiles, head_row, key_tokens_ptr, indices_ptr, bias_ptr, counts_ptr,
    qk_scale, places, video_keys, last_count, pooled, pitch,
    LOG_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, EXACT_N: tl.constexpr, EXACT_STAGES: tl.constexpr,
    ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted sum of values ``[BLOCK_M, D]`` and sum of weights ``[BLOCK_M]`` of one tile of query rows."""
    KEY_BLOCK: tl.constexpr = 1 << LOG_BLOCK
    l_i = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], q.shape[1]], tl.float32)

    begin = 0
    first_slot = 0
    if KEY_BLOCK >= EXACT_N and not ONLINE:
        count = tl.load(counts_ptr)
        acc, l_i = _attend_to_whole_blocks(
            acc, l_i, m_i, q, keys_ptr, values_ptr, keys_tiles, values_tiles, head_row, indices_ptr, count, qk_scale,
            KEY_BLOCK, EXACT_N, EXACT_STAGES, PRECISION,
        )  # fmt: skip
        begin = _end_of_list(count, LOG_BLOCK)
        first_slot = 1

    # Pooled levels, one after the other. Those of which few blocks fill a tile have loops of their own.
    if not ONLINE:
        for slot in tl.static_range(1, SLOTS - 1):
            if (slot == first_slot) and ((KEY_BLOCK >> slot) * FEW_BLOCKS >= BLOCK_N):
                count = tl.load(counts_ptr + slot)
                first_row = _first_row(LOG_BLOCK - slot, pooled, video_keys, places, LOG_BLOCK)
                acc, l_i = _attend_to_few(
                    acc, l_i, m_i, q, keys_ptr, values_ptr, indices_ptr + begin, bias_ptr + begin, count, first_row,
                    qk_scale, KEY_BLOCK >> slot, BLOCK_N, PRECISION,
                )  # fmt: skip
                begin += _end_of_list(count, LOG_BLOCK - slot)
                first_slot = slot + 1

    for slot in range(first_slot, SLOTS):
        count = tl.load(counts_ptr + slot)
        log_groups = tl.where(slot == SLOTS - 1, 0, LOG_BLOCK - slot)
        first_row = _first_row(log_groups, pooled, video_keys, places, LOG_BLOCK)
        acc, l_i, m_i = _attend_to_many(
            acc, l_i, m_i, q, keys_ptr, values_ptr, indices_ptr + begin, bias_ptr + begin, count, first_row, log_groups,
            qk_scale, BLOCK_N, ONLINE, PRECISION,
        )  # fmt: skip
        begin += _end_of_list(count, log_groups)

    log_size = tl.load(counts_ptr + SLOTS)
    ragged_rows = tl.where(log_size < 0, 0, KEY_BLOCK >> tl.maximum(log_size, 0))
    ragged_first = _first_row(LOG_BLOCK - log_size, pooled, video_keys, places, LOG_BLOCK)
    ragged_first += (video_keys - 1) * ragged_rows
    ragged_bias = 0.0
    if log_size > 0:
        ragged_bias = tl.load(bias_ptr + pitch - 1)
    return _attend_to_ragged_and_exact(
        acc, l_i, m_i, q, keys_ptr, values_ptr, key_tokens_ptr, log_size, ragged_first, ragged_rows, ragged_bias,
        last_count, video_keys * KEY_BLOCK, places, qk_scale, BLOCK_N, ONLINE, PRECISION,
    )  # fmt: skip


@triton.jit
def _neighbours_maximum(q, keys_ptr, first, places, qk_scale, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """Each query row's largest logit ``[BLOCK_M]`` of a few of the keys in as many places from ``first`` on."""
    own = first + tl.arange(0, BLOCK_N) * (q.shape[0] // BLOCK_N)
    own = tl.minimum(own, places - 1).to(tl.int64)
    k = tl.load(keys_ptr + own[:, None] * q.shape[1] + tl.arange(0, q.shape[1])[None, :])
    return tl.max(logits(q, k, PRECISION), axis=1) * qk_scale


# Key places and the pyramid's rows are arguments although others give them: an argument is read again where it is
# needed, while a product of two holds a register through every loop, and at head dim 64 there is none to spare.
@triton.jit(do_not_specialize=SIZES)
def _attend_kernel(
    q_ptr, keys_ptr, values_ptr, keys_tiles, values_tiles, out_ptr,
    query_tokens_ptr, key_tokens_ptr, indices_ptr, bias_ptr, counts_ptr, qk_scale,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_ob, stride_oh, stride_on, stride_od,
    heads, query_blocks, video_rows, places, video_keys, last_count, pyramid_rows, pooled, pitch,
    QUERY_BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT_N: tl.constexpr, EXACT_STAGES: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Query blocks of exact tokens attend to everything and take longest: those of all heads start first.
    pid = tl.program_id(0)
    video_tiles = video_rows * (QUERY_BLOCK // BLOCK_M)
    exact_tiles = (query_blocks - video_rows) * (QUERY_BLOCK // BLOCK_M)
    in_video = pid - exact_tiles * (tl.num_programs(0) // (video_tiles + exact_tiles))
    if in_video < 0:
        head, tile = pid // exact_tiles, video_tiles + pid % exact_tiles
    else:
        head, tile = in_video // video_tiles, in_video % video_tiles
    z = head.to(tl.int64)
    row = z * query_blocks + tile // (QUERY_BLOCK // BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    places_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(query_tokens_ptr + places_m).to(tl.int64)
    q_ptr += (z // heads) * stride_qb + (z % heads) * stride_qh
    q = tl.load(q_ptr + token[:, None] * stride_qn + offs_d[None, :] * stride_qd, mask=(token >= 0)[:, None], other=0.0)
    keys_ptr += z * pyramid_rows * HEAD_DIM
    values_ptr += z * pyramid_rows * HEAD_DIM
    counts_ptr += row * COUNTS
    indices_ptr += row * pitch
    bias_ptr += row * pitch

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    again = True
    for ONLINE in tl.static_range(1 - FAST, 2):  # the fast pass, then the online softmax if that was not enough
        if again:
            m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
            if not ONLINE:
                # The rows' own tokens are in the same places of the keys but for the padding of video blocks.
                padding = (video_keys << LOG_BLOCK) - video_rows * QUERY_BLOCK
                first = tile * BLOCK_M + tl.where(tile * BLOCK_M < video_rows * QUERY_BLOCK, 0, padding)
                m_i = _neighbours_maximum(q, keys_ptr, first, places, qk_scale, BLOCK_N, PRECISION)
            acc, l_i = _attend_to_lists(
                q, m_i, keys_ptr, values_ptr, keys_tiles, values_tiles, head * pyramid_rows, key_tokens_ptr,
                indices_ptr, bias_ptr, counts_ptr, qk_scale, places, video_keys, last_count, pooled, pitch,
                LOG_BLOCK, BLOCK_N, EXACT_N, EXACT_STAGES, ONLINE, PRECISION,
            )  # fmt: skip
            overflown = tl.sum(tl.sum(tl.where(acc - acc == 0.0, 0, 1), axis=1), axis=0) > 0
            again = overflown | (tl.min(l_i) < LEAST_SUM) | (tl.max(l_i) > GREATEST_SUM)

    out_ptr += (z // heads) * stride_ob + (z % heads) * stride_oh
    token = tl.load(query_tokens_ptr + places_m).to(tl.int64)
    out = (acc / l_i[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token[:, None] * stride_on + offs_d[None, :] * stride_od, out, mask=(token >= 0)[:, None])


def attend(prepared: Prepared, selection: Selection, out: Tensor) -> None:
    """Write the attention output into ``out`` ``[B, H, N, D]``, in the order of the inputs."""
    q, rows, keys = prepared.q, prepared.order.queries, prepared.order.keys
    batch, heads, _, head_dim = q.shape
    tiles = prepared.plan.attend
    described = tiles.descriptors and TensorDescriptor is not None
    keys_tiles, values_tiles = (
        _describe(pyramid, tiles.exact_n) if described else None for pyramid in (prepared.keys, prepared.values)
    )
    limits = {"maxnreg": tiles.max_registers} if tiles.max_registers else {}
    _attend_kernel[(rows.blocks * (rows.size // tiles.block_m) * batch * heads,)](
        q, prepared.keys, prepared.values, keys_tiles, values_tiles, out, rows.tokens, keys.tokens,
        selection.indices, selection.bias, selection.counts, prepared.scale * LOG2E.value,
        *head_strides(q), *head_strides(out), heads, rows.blocks, rows.video_blocks, keys.blocks * keys.size,
        keys.video_blocks, keys.last_video_count, prepared.rows.total, prepared.rows.pooled, selection.indices.shape[2],
        QUERY_BLOCK=rows.size, LOG_BLOCK=keys.size.bit_length() - 1, HEAD_DIM=head_dim,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, EXACT_N=tiles.exact_n, EXACT_STAGES=tiles.exact_stages,
        FAST=tiles.fast, PRECISION=prepared.plan.precision,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **limits,
    )  # fmt: skip


def _describe(pyramid: Tensor, rows: int) -> object:
    """Descriptor of tiles ``[rows, D]`` of the pyramids of all heads, for the GPU's copy engine."""
    flat = pyramid.flatten(0, 1)
    return TensorDescriptor(flat, flat.shape, flat.stride(), [rows, flat.shape[1]])
