"""The order of keys inside their blocks, by a tree of median splits on each block's Gram matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...grouping import full_video_blocks
from ...ordering import BlockTable
from .storage import SIZES, empty, head_strides


@triton.jit
def _rank_key(x, place, KEY_BLOCK: tl.constexpr):
    """Integers that order like x, and by place where x is the same to 2^-17 (or NaN): no two are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # of two zeros one
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered & -KEY_BLOCK) | place


@triton.jit(do_not_specialize=SIZES)
def _sort_kernel(
    k_ptr, tokens_ptr, sorted_ptr, stride_b, stride_h, stride_n, stride_d, heads, places, full_blocks,
    KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sort one block's tokens by its keys; a block that is not full keeps its order."""
    z, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_d, offs_n = tl.arange(0, HEAD_DIM), tl.arange(0, KEY_BLOCK)
    token = tl.load(tokens_ptr + block * KEY_BLOCK + offs_n)
    k_ptr += (z // heads) * stride_b + (z % heads) * stride_h
    offsets = token.to(tl.int64)[:, None] * stride_n + offs_d[None, :] * stride_d
    k = tl.load(k_ptr + offsets, mask=(token >= 0)[:, None], other=0.0).to(tl.float32)
    k -= (tl.sum(k, axis=0) / KEY_BLOCK)[None, :]
    # A power iteration with the keys' covariance is one with their Gram matrix, which is smaller.
    gram = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    largest = tl.max(tl.max(tl.abs(gram), axis=1), axis=0)
    gram *= tl.where((largest > 0) & (largest < float("inf")), 1.0 / largest, 0.0)
    place = offs_n
    if block < full_blocks:
        for level in tl.static_range(LEVELS):
            size = KEY_BLOCK >> level
            node = place // size
            same = (node[:, None] == node[None, :]).to(tl.float32)
            # Centred in the node on both sides, and 0 between nodes.
            gram *= same
            means = tl.sum(gram, axis=1) / size
            whole = tl.sum(same * means[None, :], axis=1) / size
            gram = (gram - means[None, :] + (whole - means)[:, None]) * same
            is_first = (place % size == 0).to(tl.float32)
            along = tl.sum(gram * is_first[None, :], axis=1)
            along = tl.sum(gram * along[None, :], axis=1)
            along = tl.sum(gram * along[None, :], axis=1)
            key = _rank_key(along, place, KEY_BLOCK)
            before = tl.sum(tl.where(key[None, :] < key[:, None], same, 0.0), axis=1)
            place = node * size + before.to(tl.int32)
    tl.store(sorted_ptr + z * places + block * KEY_BLOCK + place, token)


def sort_by_content(k: Tensor, table: BlockTable) -> Tensor:
    """Token at every place of each head's key blocks ``[Z, places]``, int32, in the order of content."""
    batch, heads, _, head_dim = k.shape
    places = table.blocks * table.size
    result = empty(k, batch * heads, places, dtype=torch.int32)
    _sort_kernel[(batch * heads, table.blocks)](
        k, table.tokens, result, *head_strides(k), heads, places, full_video_blocks(table),
        KEY_BLOCK=table.size, HEAD_DIM=head_dim, LEVELS=table.size.bit_length() - 2,
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32", num_warps=8 if table.size == 128 else 4,
    )  # fmt: skip
    return result
