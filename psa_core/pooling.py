"""The pyramid: keys and values averaged over groups of tokens, and how much is lost by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


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

    def rows_to(self, dtype: torch.dtype) -> Pooled:
        """The same with keys and values in another precision."""
        return replace(self, keys=self.keys.to(dtype), values=self.values.to(dtype))


def mean_key(k: Tensor) -> Tensor:
    """Mean of each head's keys ``[B, H, N, D]``, which all are centred about ``[B, H, 1, D]``, fp64.

    Softmax does not see what all keys have in common; variances and rounding do.
    """
    return k.double().mean(dim=2, keepdim=True)


def gather_blocks(x: Tensor, places: Tensor, centre: Tensor | None = None) -> Tensor:
    """Lay tokens ``[B, H, N, D]`` out in fp64 blocks ``[B, H, blocks, size, D]``; empty places are 0.

    Args:
        places: Token at every place of the blocks ``[blocks, size]``; -1 where there is none.
        centre: What to subtract from every token ``[B, H, 1, D]``.
    """
    tokens = places.long()
    gathered = x[:, :, tokens.clamp(min=0)].double()
    if centre is not None:
        gathered = gathered - centre.unsqueeze(3)
    return torch.where((tokens >= 0)[..., None], gathered, gathered.new_zeros(()))


def pool_blocks(keys: Tensor, values: Tensor, places: Tensor, group_size: int) -> Pooled:
    """Average blocks over groups of consecutive places.

    Args:
        keys: Centred keys in blocks ``[B, H, blocks, size, D]``, 0 at empty places.
        values: Values in blocks, likewise.
        places: Token at every place ``[blocks, size]``; -1 where there is none.
        group_size: Tokens per group, a divisor of ``size``.
    """
    filled = (places >= 0).view(len(places), -1, group_size)  # [blocks, groups, group_size]
    counts = filled.sum(-1)
    key_means, key_spread = _group_means(keys, filled, counts)
    value_means, value_spread = _group_means(values, filled, counts)
    tokens = counts.sum(-1).clamp(min=1).to(keys.dtype)
    return Pooled(
        group_size=group_size,
        keys=key_means,
        values=value_means,
        counts=counts,
        key_variance=key_spread / tokens[:, None],
        value_variance=value_spread.sum(-1) / tokens,
    )


def cut_blocks(keys: Tensor, values: Tensor, places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of keys, values and places, as :func:`pool_blocks` takes them, cut into smaller ones."""
    keys, values = (x.reshape(*x.shape[:2], -1, size, x.shape[-1]) for x in (keys, values))
    return keys, values, places.reshape(-1, size)


def join_blocks(parts: Sequence[Pooled]) -> Pooled:
    """One of several that follow each other."""
    return Pooled(
        group_size=parts[0].group_size,
        keys=torch.cat([part.keys for part in parts], dim=2),
        values=torch.cat([part.values for part in parts], dim=2),
        counts=torch.cat([part.counts for part in parts]),
        key_variance=torch.cat([part.key_variance for part in parts], dim=2),
        value_variance=torch.cat([part.value_variance for part in parts], dim=2),
    )


def _group_means(x: Tensor, filled: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Group means ``[B, H, blocks, groups, D]`` and sums of squared deviations ``[B, H, blocks, D]``."""
    groups = x.view(*x.shape[:3], *filled.shape[1:], x.shape[-1])
    means = groups.sum(4) / counts.clamp(min=1)[..., None].to(x.dtype)
    deviations = (groups - means.unsqueeze(4)) * filled[..., None]
    return means, deviations.square().sum(dim=(3, 4))
