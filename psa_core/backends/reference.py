"""The definition of the result, in plain torch: any device, fp32 or fp64, statistics always in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import PSAConfig
from ..grouping import rearrange, sort_by_content
from ..importance import (
    BLOCK_BIAS_CLAMP,
    LEVEL_BIAS_CLAMP,
    bias_from_variance,
    block_importance,
    logit_variance,
)
from ..levels import cap_levels, select_by_error, select_by_rank, similarity_limits
from ..ordering import BlockTable, TokenOrder
from ..pooling import Pooled, centre_keys, gather_blocks, pool_blocks


@dataclass(frozen=True)
class Prepared:
    """Queries in blocks and the pyramid of keys and values.

    Args:
        order: Index tables.
        config: The call's settings.
        scale: Softmax scale.
        k: Keys as they came ``[B, H, N, D]``.
        places: Which place of the table's each place of a key block holds ``[B, H, blocks, size]``; None for its own.
        queries: Queries in blocks ``[B, H, query blocks, size, D]``.
        query_squares: Mean over a block's rows of q squared ``[B, H, query blocks, D]``, fp64.
        pyramid: One entry per level of the config that is not skip, level 1 first; level 1 is there in any case.
        whole: Every key block, exact ones too, in one group.
        value_power: Mean of ``|v|^2`` of each head ``[B, H]``, fp64.
    """

    order: TokenOrder
    config: PSAConfig
    scale: float
    k: Tensor
    places: Tensor | None
    queries: Tensor
    query_squares: Tensor
    pyramid: tuple[Pooled, ...]
    whole: Pooled
    value_power: Tensor


def workspace_bytes_per_head(q: Tensor, order: TokenOrder, config: PSAConfig) -> int:
    """Temporary memory of one head of one batch item, in bytes: fp64 copies of q, k, v and the pyramid, and pairs."""
    rows = 2 * order.queries.blocks * order.queries.size + 8 * order.keys.blocks * order.keys.size
    pairs = order.queries.blocks * order.keys.blocks * (len(config.levels) + 4)
    return 8 * (rows * q.shape[-1] + pairs)


def prepare(q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> Prepared:
    """Order, centre and pool ``[B, H, N, D]`` queries, keys and values."""
    queries = gather_blocks(q.double(), order.queries)
    keys = gather_blocks(centre_keys(k.double()), order.keys)
    values = gather_blocks(v.double(), order.keys)
    places = sort_by_content(keys, order.keys) if config.group_keys else None
    if places is not None:
        keys, values = rearrange(keys, places), rearrange(values, places)
    sizes = sorted({1, *config.group_sizes})
    return Prepared(
        order=order,
        config=config,
        scale=scale,
        k=k,
        places=places,
        queries=queries,
        query_squares=queries.square().sum(3) / order.queries.counts.double()[:, None],
        pyramid=tuple(pool_blocks(keys, values, order.keys, size) for size in sizes),
        whole=pool_blocks(keys, values, order.keys, order.keys.size),
        value_power=v.double().square().sum(-1).mean(-1),
    )


def importance(prepared: Prepared) -> Tensor:
    """Estimated attention mass ``[B, H, query blocks, key blocks]``, fp64; rows sum to 1."""
    variance = logit_variance(prepared.query_squares, prepared.whole.key_variance, prepared.scale)
    return block_importance(
        prepared.queries,
        _filled(prepared.order.queries),
        prepared.whole.keys.squeeze(3),
        prepared.order.keys.counts,
        bias_from_variance(variance, BLOCK_BIAS_CLAMP),
        prepared.scale,
        prepared.config.importance_stride,
    )


def select(prepared: Prepared, importance: Tensor) -> Tensor:
    """Level codes of every pair ``[B, H, query blocks, key blocks]``, uint8; pairs with an exact block have level 1."""
    video_rows, video_keys = prepared.order.queries.video_blocks, prepared.order.keys.video_blocks
    mass = importance[:, :, :video_rows, :video_keys]
    if prepared.config.selection == "error":
        levels = [_level(prepared, size) for size in prepared.config.group_sizes]
        squares = prepared.query_squares[:, :, :video_rows]
        variances = [logit_variance(squares, level.key_variance[:, :, :video_keys], prepared.scale) for level in levels]
        codes = select_by_error(
            mass,
            torch.stack(variances),
            torch.stack([level.value_variance[:, :, :video_keys] for level in levels]),
            prepared.value_power,
            prepared.order.keys.counts[:video_keys],
            prepared.config,
        )
    else:
        codes = select_by_rank(mass, prepared.config)
        if prepared.config.similarity_caps is not None:
            places = prepared.order.keys.tokens.view(-1, prepared.order.keys.size)[:video_keys]
            codes = cap_levels(codes, similarity_limits(prepared.k.double(), places, prepared.config))
    everything = torch.zeros(importance.shape, dtype=torch.uint8, device=importance.device)
    everything[:, :, :video_rows, :video_keys] = codes
    return everything


def attend(prepared: Prepared, codes: Tensor, out: Tensor) -> None:
    """Attend every query block to its own selection of the pyramid and write ``out`` ``[B, H, N, D]``."""
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    levels = [(level, *_rows_of(level, prepared, dtype)) for level in prepared.pyramid]
    table = prepared.order.queries
    queries = (prepared.scale * prepared.queries).to(dtype)  # the scale first: without it, fp32 overflows sooner
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            for i in range(table.blocks):
                keys, values, bias = _selected_rows(levels, codes[b, h, i], (b, h, i))
                rows = slice(0, int(table.counts[i]))
                logits = queries[b, h, i, rows] @ keys.T + bias
                tokens = table.tokens[i * table.size : (i + 1) * table.size][rows].long()
                out[b, h, tokens] = (torch.softmax(logits, dim=-1) @ values).to(out.dtype)


def count(prepared: Prepared, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Density ``[B, H]``, fp32, and number of video pairs at each level of the config ``[B, H, levels]``, int64."""
    rows, keys = prepared.order.queries, prepared.order.keys
    tokens = int(keys.counts.sum())
    work = torch.zeros(codes.shape, dtype=torch.float64, device=codes.device)
    for level in prepared.pyramid:
        groups = (level.counts > 0).sum(-1).double()
        work = torch.where(codes == level.group_size.bit_length() - 1, groups, work)
    density = (work * rows.counts[:, None]).sum(dim=(2, 3)) / tokens**2
    video = codes[:, :, : rows.video_blocks, : keys.video_blocks]
    pairs = torch.stack([(video == code).sum(dim=(2, 3)) for code in prepared.config.level_codes], dim=-1)
    return density.float(), pairs


def _filled(table: BlockTable) -> Tensor:
    return (table.tokens >= 0).view(table.blocks, table.size)


def _level(prepared: Prepared, size: int) -> Pooled:
    return next(level for level in prepared.pyramid if level.group_size == size)


def _rows_of(level: Pooled, prepared: Prepared, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[B, H, blocks, groups, D]`` and logit bias ``[B, H, query blocks, blocks]`` of a level."""
    variance = logit_variance(prepared.query_squares, level.key_variance, prepared.scale)
    if level.group_size == 1 or not prepared.config.variance_term:
        variance = torch.zeros_like(variance)
    return level.keys.to(dtype), level.values.to(dtype), bias_from_variance(variance, LEVEL_BIAS_CLAMP).to(dtype)


def _selected_rows(
    levels: list[tuple[Pooled, Tensor, Tensor, Tensor]], codes: Tensor, block: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and logit bias of everything that one query block attends to."""
    b, h, i = block
    keys, values, biases = [], [], []
    for level, level_keys, level_values, level_bias in levels:
        chosen = (codes == level.group_size.bit_length() - 1).nonzero().squeeze(1)
        counts = level.counts[chosen]
        filled = counts > 0
        keys.append(level_keys[b, h, chosen][filled])
        values.append(level_values[b, h, chosen][filled])
        biases.append((counts.to(level_bias.dtype).log() + level_bias[b, h, i, chosen, None])[filled])
    return torch.cat(keys), torch.cat(values), torch.cat(biases)


def warm_up(q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> None:
    """Nothing: plain torch has nothing to compile."""
