"""From importance to the level of every (query block, key block)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SKIP_CODE, PSAConfig, level_code


def select_by_error(
    importance: Tensor,
    logit_variances: Tensor,
    value_variances: Tensor,
    value_power: Tensor,
    key_counts: Tensor,
    config: PSAConfig,
) -> Tensor:
    """Take the level with the least predicted squared error plus weighted cost.

    Of a pair with attention mass ``p``, a level in groups of g tokens has the predicted squared error
    ``p^2 a var(v) / P`` and the cost ``error_weight / blocks * ceil(n / g) / n``: ``a`` is the variance of the logits
    that pooling loses, ``var(v)`` that of the values, ``P`` the head's value power, which takes the unit out, and ``n``
    the block's tokens. Level 1 has no error and the cost ``error_weight / blocks``.

    Args:
        importance: Attention mass ``p`` of every pair ``[B, H, query blocks, video blocks]``.
        logit_variances: ``a`` of every pair at every level ``[levels, B, H, query blocks, video blocks]``; the first,
            level 1, is not looked at.
        value_variances: Within-group value variance of every block ``[levels, B, H, video blocks]``.
        value_power: Mean of ``|v|^2`` of each head ``[B, H]``.
        key_counts: Tokens of every video key block ``[video blocks]``.
        config: ``error_weight`` and the levels.

    Returns:
        Level codes ``[B, H, query blocks, video blocks]``, uint8. Ties go to the finer level; a level whose predicted
        error is not finite is not taken.

    Source: the pyramid's levels are those of PSA, arXiv:2512.04025; choosing them by predicted error is this
    project's own.
    """
    assert config.error_weight is not None
    weight = config.error_weight / max(len(key_counts), 1)
    best = torch.full_like(importance, weight)  # level 1: no error, full cost
    codes = torch.zeros_like(importance, dtype=torch.uint8)
    for index, (size, code) in enumerate(zip(config.group_sizes, config.level_codes, strict=True)):
        if size == 1:
            continue
        error = importance.square() * logit_variances[index] * value_variances[index].unsqueeze(2)
        error = error / value_power[:, :, None, None]
        groups = (key_counts + size - 1) // size
        score = error + weight * (groups / key_counts)
        better = (score < best) & error.isfinite()
        best = torch.where(better, score, best)
        codes = torch.where(better, code, codes)
    return codes


def select_by_rank(importance: Tensor, config: PSAConfig) -> Tensor:
    """Take levels by the rank of a block (``topk``) or by the mass that ranks before it (``threshold``).

    Args:
        importance: Attention mass of every pair ``[B, H, query blocks, video blocks]``; renormalised here.
        config: ``ranges`` and the levels.

    Returns:
        Level codes ``[B, H, query blocks, video blocks]``, uint8. Equal masses rank in block order; a mass that is
        not a number gets the finest level.
    """
    assert config.ranges is not None
    ordered, blocks = torch.sort(importance, dim=-1, descending=True, stable=True)
    if config.selection == "topk":
        ranks = torch.arange(ordered.shape[-1], dtype=torch.float64, device=ordered.device)
        place = (ranks / ordered.shape[-1]).expand_as(ordered)
    else:
        mass_up_to = (ordered / ordered.sum(-1, keepdim=True)).cumsum(-1)
        place = torch.nn.functional.pad(mass_up_to[..., :-1], (1, 0))  # the mass of those before
    # Plain numbers all along: a list made into a tensor on the device would wait for the device.
    finest, *coarser = config.level_codes
    ranked = torch.full_like(blocks, finest, dtype=torch.uint8)
    for (low, _), code in zip(config.ranges[1:], coarser, strict=True):
        ranked.masked_fill_(place >= low, code)
    ranked.masked_fill_(ordered.isnan(), finest)
    return torch.empty_like(ranked).scatter_(-1, blocks, ranked)


def similarity_limits(k: Tensor, places: Tensor, config: PSAConfig) -> Tensor:
    """The coarsest level at which every key block's keys resemble each other enough.

    A block's similarity at a level is the mean over its groups of the cosine of a group's first and last key. The
    coarsest level whose similarity is above its cap is the limit, level 1 if there is none.

    Args:
        k: Keys as they came, not centred ``[B, H, N, D]``.
        places: Token at every place of every video block ``[video blocks, key_block]``, int32; -1 where there is none.
        config: ``similarity_caps``.

    Returns:
        Level codes ``[B, H, video blocks]``, uint8.

    Source: the similarity mask of the official PSA code, by whose definition first and last key stand for a group.
    """
    assert config.similarity_caps is not None
    limits = torch.zeros(*k.shape[:2], len(places), dtype=torch.uint8, device=k.device)
    for level, least in config.similarity_caps:
        code = level_code(level, config.key_block)
        limits = torch.where(_group_similarity(k, places, level) > least, code, limits)
    return limits


def cap_levels(codes: Tensor, limits: Tensor) -> Tensor:
    """Pool no key block coarser than its limit; what is skipped stays skipped.

    Args:
        codes: Level codes ``[B, H, query blocks, video blocks]``, uint8.
        limits: Level codes ``[B, H, video blocks]``, uint8.

    Returns:
        Level codes of the shape of ``codes``.
    """
    return torch.where(codes == SKIP_CODE, codes, torch.minimum(codes, limits.unsqueeze(2)))


def _group_similarity(k: Tensor, places: Tensor, group_size: int) -> Tensor:
    """Mean over a block's groups of the cosine of their first and last key ``[B, H, video blocks]``."""
    groups = places.long().view(len(places), places.shape[1] // group_size, group_size)  # [blocks, groups, group_size]
    counts = (groups >= 0).sum(-1)
    last = groups.gather(-1, (counts - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    first_keys, last_keys = (k[:, :, ends.clamp(min=0)].double() for ends in (groups[..., 0], last))
    filled = counts > 0
    cosines = torch.where(filled, torch.cosine_similarity(first_keys, last_keys, dim=-1), 0.0)
    similarity: Tensor = cosines.sum(-1) / filled.sum(-1)
    return similarity
