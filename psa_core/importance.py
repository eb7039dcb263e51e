"""How much attention a block of queries gives a block of keys, estimated from means of the block's keys."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BIAS_CLAMP = 3.0
PART_BIAS_CLAMP = 1.5
LEVEL_BIAS_CLAMP = 1.0


def logit_variance(query_squares: Tensor, key_variance: Tensor, scale: float) -> Tensor:
    """Variance of a pooled group's logits about the logit of its mean key, in the mean over a query block's rows.

    ``a = scale^2 sum_d mean_r(q_rd^2) var_d(k)``, with the keys' variance about their group's mean.

    Args:
        query_squares: Mean over a query block's rows of q squared ``[B, H, query blocks, D]``.
        key_variance: Within-group key variance ``[B, H, key blocks, D]``.
        scale: Softmax scale.

    Returns:
        ``a``, ``[B, H, query blocks, key blocks]``.
    """
    return scale * scale * query_squares @ key_variance.transpose(-1, -2)


def bias_from_variance(variance: Tensor, clamp: float) -> Tensor:
    """Second-order term of a pooled logit: the mean of exponentials exceeds the exponential of the mean.

    Half the logit variance, clamped because the expansion overshoots where the variance is large. What is not a number
    is clamped as well: a row of queries that is not finite then spoils no other row of its block.
    """
    return torch.fmin(variance / 2, variance.new_full((), clamp))


def importance_bias_clamp(parts: int) -> float:
    """Where the second-order term of the importance ends, for key blocks in one group or in several."""
    return BLOCK_BIAS_CLAMP if parts == 1 else PART_BIAS_CLAMP


def block_importance(
    queries: Tensor, filled: Tensor, mean_keys: Tensor, key_counts: Tensor, bias: Tensor, scale: float, parts: int
) -> Tensor:
    """Estimate the attention mass of every (query block, key block).

    Args:
        queries: Rows of the query blocks that are looked at ``[B, H, query blocks, rows, D]``.
        filled: Which of them hold a token ``[query blocks, rows]``.
        mean_keys: Mean centred key of every group of keys ``[B, H, groups, D]``.
        key_counts: Tokens of every group ``[groups]``; an empty one gets nothing.
        bias: Second-order term of every pair ``[B, H, query blocks, groups]``.
        scale: Softmax scale.
        parts: Neighbouring groups that make a key block.

    Returns:
        ``[B, H, query blocks, key blocks]``; rows sum to 1.
    """
    weights = filled.to(queries.dtype)
    logits = scale * queries @ mean_keys.transpose(-1, -2).unsqueeze(2)
    logits = logits + key_counts.to(logits.dtype).log() + bias.unsqueeze(3)
    mass = torch.softmax(logits, dim=-1)
    mass = (mass * weights[..., None]).sum(3) / weights.sum(-1)[:, None]
    return mass.view(*mass.shape[:3], -1, parts).sum(-1)
