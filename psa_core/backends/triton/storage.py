"""How the Triton backend lays its data out, and how much memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ...config import PSAConfig
from ...ordering import TokenOrder
from .plan import Plan

SLOTS = tl.constexpr(5)  # levels 1, 2, 4, 8 and whole block, in this order, whether in use or not
COUNTS = tl.constexpr(8)  # integers kept per query block: see Selection.counts
PADDED_ROWS = tl.constexpr(64)  # lists of pooled blocks end with a whole tile of so many rows, or a divisor of that
ROWS_PER_MEAN = 512
# Bytes that ranking takes for a pair (levels.py): a mass and its block in int64, masses up to it and before it, its
# level and a comparison. PyTorch sorts longer rows out of place, with room for a copy of all, its input included.
RANKED, RANKED_APART = 4 + 8 + 4 + 4 + 1 + 1, 4 + 8 + 8 + 4 + 8 + 4
SORTED_IN_PLACE = 4096
# Kernel arguments that follow from the video's size and the heads. Triton would compile a kernel anew when one of them
# turns into a multiple of 16 or 1, which nothing gains from: so the self-check compiles for all sizes to come.
SIZES = (
    "heads", "tokens", "query_blocks", "key_blocks", "video_rows", "video_keys", "last_count", "pyramid_rows", "pooled",
    "places", "full_blocks", "parts", "part_pitch",
)  # fmt: skip


@dataclass(frozen=True)
class PyramidRows:
    """Where each level's rows are in a head's pyramid ``[rows, D]``.

    Level 1 comes first with a row for every place of every key block. The pooled levels in use follow, from fine to
    coarse, with the groups of the video blocks, last the mean of every key block, exact ones included.

    Args:
        pooled: Groups of a video block at those of the levels 2, 4 and 8 that are in use: as each has half as many as
            the one before, the number's bits say which. Kernels find a level's first row by it.
        total: Rows in all.
    """

    pooled: int
    total: int

    @staticmethod
    def of(order: TokenOrder, config: PSAConfig) -> PyramidRows:
        """Lay out the levels that the config uses."""
        keys = order.keys
        pooled = sum(keys.size // size for size in (2, 4, 8) if size in config.levels)
        return PyramidRows(pooled, keys.blocks * (keys.size + 1) + keys.video_blocks * pooled)


@dataclass(frozen=True)
class Prepared:
    """What the kernels share about one chunk of heads; ``Z`` is batch times heads.

    Args:
        q: Queries as they came ``[B, H, N, D]``.
        k: Keys as they came, likewise.
        order: Index tables.
        config: The call's settings.
        scale: Softmax scale.
        plan: What the kernels are launched with.
        rows: Where each level's rows are.
        keys: Pyramid of centred keys ``[Z, rows, D]``, the plan's dtype.
        values: Pyramid of values, likewise.
        parts: Means of the groups of keys by which the importance is estimated ``[Z, key blocks * parts, D]``.
        part_variance: Variance of the keys within each of them, likewise, fp32.
        key_variance: Within-group variance at levels 2, 4, 8, whole ``[Z, 4, key blocks, D]``, fp32.
        value_variance: The same of the values, summed over D ``[Z, 4, key blocks]``, fp32.
        value_power: Mean of ``|v|^2`` of each head ``[Z]``, fp32.
        query_squares: Mean of q squared over a block's rows ``[Z, query blocks, D]``, fp32.
    """

    q: Tensor
    k: Tensor
    order: TokenOrder
    config: PSAConfig
    scale: float
    plan: Plan
    rows: PyramidRows
    keys: Tensor
    values: Tensor
    parts: Tensor
    part_variance: Tensor
    key_variance: Tensor
    value_variance: Tensor
    value_power: Tensor
    query_squares: Tensor


@dataclass(frozen=True)
class Selection:
    """Which video key blocks each query block attends to, and at which level.

    A ragged last video block, which has empty places, is not listed: its level is kept apart.

    Args:
        indices: Video key blocks of every query block, level after level from fine to coarse, ascending within a level
            ``[Z, query blocks, list pitch]``, int32. A level begins where the last one's tiles end: what fills these
            up is block 0 with no weight.
        bias: Logit addend of every listed block in powers of two: log of its groups' tokens and the second-order term;
            of a ragged block at a pooled level the latter alone, at the last place
            ``[Z, query blocks, list pitch]``, fp32.
        counts: Blocks listed at levels 1, 2, 4, 8 and whole; level code of the ragged block, -1 if there is none or it
            is skipped; groups attended to in video blocks ``[Z, query blocks, COUNTS]``, int32.
    """

    indices: Tensor
    bias: Tensor
    counts: Tensor


def workspace_bytes_per_head(q: Tensor, order: TokenOrder, config: PSAConfig) -> int:
    """Temporary memory of one head of one batch item, in bytes."""
    head_dim, keys, queries = q.shape[-1], order.keys, order.queries
    item, parts = Plan.of(q, order).rows_dtype.itemsize, keys.blocks * config.importance_parts
    pyramid = head_dim * (2 * PyramidRows.of(order, config).total * item + parts * (item + 4))
    statistics = 4 * (4 * keys.blocks * (head_dim + 1) + queries.blocks * head_dim)
    tokens = 4 * keys.blocks * keys.size if config.group_keys else 0
    sums = 4 * head_dim * -(-q.shape[2] // ROWS_PER_MEAN)
    pitch = pair_pitch(keys.blocks)
    chosen = pitch * (1 + 4) + list_pitch(keys.video_blocks) * (4 + 4) + 4 * COUNTS.value
    if config.selection != "error":  # before anything is listed, masses are ranked; codes are kept twice
        chosen = max(pitch * (RANKED if keys.video_blocks <= SORTED_IN_PLACE else RANKED_APART), chosen + pitch)
    pairs = queries.blocks * (4 * pitch + max(chosen, 4 * pair_pitch(parts)))
    return pyramid + statistics + tokens + sums + pairs


def pair_pitch(key_blocks: int) -> int:
    """Elements from one query block's row of a matrix of pairs to the next: rows that begin aligned load faster."""
    return -(-key_blocks // 16) * 16


def list_pitch(video_blocks: int) -> int:
    """Elements from one query block's list to the next: every block, what fills up tiles, and a tile read ahead."""
    return pair_pitch(video_blocks + 4 * PADDED_ROWS.value)


def head_strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of ``[B, H, N, D]`` in elements."""
    b, h, n, d = x.stride()
    return b, h, n, d


def empty(x: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on x's device."""
    return torch.empty(shape, dtype=dtype, device=x.device)
