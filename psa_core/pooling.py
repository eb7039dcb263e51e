"""The pyramid: keys and values averaged over groups of tokens, and how much is lost by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ordering import BlockTable


@dataclass(frozen=True)
class Pooled:
    """Keys and values of every block, averaged over groups of one size.

    Args:
        group_size: Tokens per group.
        keys: Mean keys ``[B, H, blocks, groups, D]``; 0 for an empty group.
        values: Mean values, likewise.
        counts: Tokens in each group ``[blocks, groups]``; 0 for an empty group.
        key_variance: Biased variance of the keys about their group's mean, averaged over the block's tokens
            ``[B, H, blocks, D]``.
        value_variance: The same of the values, summed over the head dim ``[B, H, blocks]``.
    """

    group_size: int
    keys: Tensor
    values: Tensor
    counts: Tensor
    key_variance: Tensor
    value_variance: Tensor


def gather_blocks(x: Tensor, table: BlockTable) -> Tensor:
    """Lay tokens ``[B, H, N, D]`` out in blocks ``[B, H, blocks, size, D]``; empty places are 0."""
    tokens = table.tokens.long()
    gathered = x[:, :, tokens.clamp(min=0)]
    gathered = torch.where((tokens >= 0)[:, None], gathered, torch.zeros((), dtype=x.dtype, device=x.device))
    return gathered.view(*x.shape[:2], table.blocks, table.size, x.shape[-1])


def centre_keys(k: Tensor) -> Tensor:
    """Subtract each head's mean key from ``[B, H, N, D]``. Softmax does not see it; variances and rounding do."""
    return k - k.mean(dim=2, keepdim=True)


def pool_blocks(keys: Tensor, values: Tensor, table: BlockTable, group_size: int) -> Pooled:
    """Average blocks over groups of consecutive places.

    Args:
        keys: Centred keys in blocks ``[B, H, blocks, size, D]``, 0 at empty places.
        values: Values in blocks, likewise.
        table: The blocks' table.
        group_size: Tokens per group, a divisor of ``size``.
    """
    filled = (table.tokens >= 0).view(table.blocks, -1, group_size)  # [blocks, groups, group_size]
    counts = filled.sum(-1)
    key_means, key_spread = _group_means(keys, filled, counts)
    value_means, value_spread = _group_means(values, filled, counts)
    tokens = table.counts.to(keys.dtype)
    return Pooled(
        group_size=group_size,
        keys=key_means,
        values=value_means,
        counts=counts,
        key_variance=key_spread / tokens[:, None],
        value_variance=value_spread.sum(-1) / tokens,
    )


def _group_means(x: Tensor, filled: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Group means ``[B, H, blocks, groups, D]`` and sums of squared deviations ``[B, H, blocks, D]``."""
    groups = x.view(*x.shape[:3], *filled.shape[1:], x.shape[-1])
    means = groups.sum(4) / counts.clamp(min=1)[..., None].to(x.dtype)
    deviations = (groups - means.unsqueeze(4)) * filled[..., None]
    return means, deviations.square().sum(dim=(3, 4))
