"""The definition of the result, in plain torch: any device, fp32 or fp64, statistics always in fp64.

Whatever grows with pairs of tokens is worked through in parts, so that a head needs little more than its pyramid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import PSAConfig
from ..grouping import full_video_blocks, rearrange, sort_by_content
from ..importance import (
    LEVEL_BIAS_CLAMP,
    bias_from_variance,
    block_importance,
    importance_bias_clamp,
    logit_variance,
)
from ..levels import cap_levels, select_by_error, select_by_rank, similarity_limits
from ..ordering import BlockTable, TokenOrder
from ..pooling import Pooled, cut_blocks, gather_blocks, join_blocks, mean_key, pool_blocks

PART = 2**19  # elements of a tensor that a step makes on its way, for each head, where there are more in all
TENSORS = 8  # of that size, in fp64, that a step holds at the same time


@dataclass(frozen=True)
class Prepared:
    """Queries, the pyramid of keys and values, and what levels are chosen by.

    Args:
        order: Index tables.
        config: The call's settings.
        scale: Softmax scale.
        q: Queries as they came ``[B, H, N, D]``.
        k: Keys as they came, likewise.
        key_order: Which of its block's places each key place gets its key from ``[B, H, blocks, size]``, uint8; None
            where keys stay in the order of the table.
        query_squares: Mean over a block's rows of q squared ``[B, H, query blocks, D]``, fp64.
        pyramid: One entry per level of the config that is not skip, level 1 first; level 1 is there in any case. Rows
            are in the precision in which they are attended to, statistics in fp64.
        parts: The groups by which the importance is estimated, of all key blocks, exact ones too, fp64; each of them
            is a block of its own.
        value_power: Mean of ``|v|^2`` of each head ``[B, H]``, fp64.
    """

    order: TokenOrder
    config: PSAConfig
    scale: float
    q: Tensor
    k: Tensor
    key_order: Tensor | None
    query_squares: Tensor
    pyramid: tuple[Pooled, ...]
    parts: Pooled
    value_power: Tensor


def workspace_bytes_per_head(q: Tensor, order: TokenOrder, config: PSAConfig) -> int:
    """Temporary memory of one head of one batch item, in bytes, where no gradients are wanted."""
    rows, keys, head_dim = order.queries, order.keys, q.shape[-1]
    places = keys.blocks * keys.size
    exact = 2 * places * head_dim * _precision(q.dtype).itemsize
    pyramid = sum(exact // size for size in _sizes(config))
    kept = len(_sizes(config)) + 3 * config.importance_parts
    statistics = 8 * (kept * keys.blocks * (head_dim + 1) + rows.blocks * head_dim + 3 * places)
    statistics += 2 * places * config.group_keys
    pairs = 8 * rows.blocks * keys.blocks
    in_parts = max(
        _elements_at_a_time(keys.blocks, _elements_to_pool(keys, head_dim)),
        _elements_at_a_time(rows.blocks, _elements_to_pool(rows, head_dim)),
        _elements_at_a_time(rows.blocks, _elements_to_estimate(order, config, head_dim)),
        _elements_at_a_time(rows.blocks, _elements_to_select(order, config)),
        _elements_at_a_time(rows.size, places),
    )
    # Parts of level 1 are joined, and all of it may be attended to at once: it is there twice. Before there is any
    # of it, there is an fp64 copy of the keys; at the end there are some matrices of pairs to count.
    attending = pyramid + exact + 8 * TENSORS * in_parts + 2 * pairs
    return statistics + max(8 * q.shape[2] * head_dim, attending, pyramid + 4 * pairs)


def prepare(q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> Prepared:
    """Order, centre and pool ``[B, H, N, D]`` keys and values; queries stay where they are."""
    centre, precision = mean_key(k), _precision(q.dtype)
    levels: dict[int, list[Pooled]] = {size: [] for size in _sizes(config)}
    parts, power, key_orders = [], [], []
    part = order.keys.size // config.importance_parts
    for blocks in _parts(order.keys.blocks, _elements_to_pool(order.keys, q.shape[-1])):
        places = _places(order.keys)[blocks]
        keys, values = gather_blocks(k, places, centre), gather_blocks(v, places)
        if config.group_keys:
            key_order = sort_by_content(keys, full_video_blocks(order.keys) - blocks.start)
            keys, values = rearrange(keys, key_order), rearrange(values, key_order)
            key_orders.append(key_order.byte())
        power.append(values.square().sum(dim=(2, 3, 4)))
        parts.append(pool_blocks(*cut_blocks(keys, values, places, part), part))
        for size in _sizes(config):
            levels[size].append(pool_blocks(keys, values, places, size).rows_to(precision))
    squares = [
        gather_blocks(q, _places(order.queries)[blocks]).square().sum(3)
        for blocks in _parts(order.queries.blocks, _elements_to_pool(order.queries, q.shape[-1]))
    ]
    return Prepared(
        order=order,
        config=config,
        scale=scale,
        q=q,
        k=k,
        key_order=torch.cat(key_orders, dim=2) if config.group_keys else None,
        query_squares=torch.cat(squares, dim=2) / order.queries.counts.double()[:, None],
        pyramid=tuple(join_blocks(levels.pop(size)) for size in _sizes(config)),
        parts=join_blocks(parts),
        value_power=torch.stack(power).sum(0) / q.shape[2],
    )


def importance(prepared: Prepared) -> Tensor:
    """Estimated attention mass ``[B, H, query blocks, key blocks]``, fp64; rows sum to 1."""
    order, config, keys = prepared.order, prepared.config, prepared.parts
    clamp, result = importance_bias_clamp(config.importance_parts), []
    for blocks in _parts(order.queries.blocks, _elements_to_estimate(order, config, prepared.q.shape[-1])):
        places = _places(order.queries)[blocks, :: config.importance_stride]
        variance = logit_variance(prepared.query_squares[:, :, blocks], keys.key_variance, prepared.scale)
        result.append(
            block_importance(
                gather_blocks(prepared.q, places),
                places >= 0,
                keys.keys.squeeze(3),
                keys.counts.squeeze(1),
                bias_from_variance(variance, clamp),
                prepared.scale,
                config.importance_parts,
            )
        )
    return torch.cat(result, dim=2)


def select(prepared: Prepared, importance: Tensor) -> Tensor:
    """Level codes of every pair ``[B, H, query blocks, key blocks]``, uint8; pairs with an exact block have level 1."""
    order, config = prepared.order, prepared.config
    video_rows, video_keys = order.queries.video_blocks, order.keys.video_blocks
    everything = torch.zeros(importance.shape, dtype=torch.uint8, device=importance.device)
    for blocks in _parts(video_rows, _elements_to_select(order, config)):
        mass = importance[:, :, blocks, :video_keys]
        everything[:, :, blocks, :video_keys] = (
            _select_by_error(prepared, mass, blocks) if config.selection == "error" else select_by_rank(mass, config)
        )
    if config.similarity_caps is not None and video_rows:
        places = _places(order.keys)[:video_keys]
        limits = [
            similarity_limits(prepared.k, places[blocks], config)
            for blocks in _parts(video_keys, _elements_to_pool(order.keys, prepared.q.shape[-1]))
        ]
        video = everything[:, :, :video_rows, :video_keys]
        video.copy_(cap_levels(video, torch.cat(limits, dim=2)))
    return everything


def attend(prepared: Prepared, codes: Tensor, out: Tensor) -> None:
    """Attend every query block to its own selection of the pyramid and write ``out`` ``[B, H, N, D]``."""
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            for i in range(prepared.order.queries.blocks):
                _attend_block(prepared, codes[b, h, i], (b, h, i), out)


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


def warm_up(q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> None:
    """Nothing: plain torch has nothing to compile."""


def _select_by_error(prepared: Prepared, mass: Tensor, blocks: slice) -> Tensor:
    """Level codes of some query blocks ``[B, H, blocks, video key blocks]``."""
    keys, config = prepared.order.keys, prepared.config
    levels = [level for level in prepared.pyramid if level.group_size in config.group_sizes]
    squares = prepared.query_squares[:, :, blocks]
    variances = [
        logit_variance(squares, level.key_variance[:, :, : keys.video_blocks], prepared.scale) for level in levels
    ]
    return select_by_error(
        mass,
        torch.stack(variances),
        torch.stack([level.value_variance[:, :, : keys.video_blocks] for level in levels]),
        prepared.value_power,
        keys.counts[: keys.video_blocks],
        config,
    )


def _attend_block(prepared: Prepared, codes: Tensor, block: tuple[int, int, int], out: Tensor) -> None:
    """Write the output of one query block."""
    dtype, table, (b, h, i) = _precision(out.dtype), prepared.order.queries, block
    tokens = _places(table)[i, : int(table.counts[i])].long()
    keys, values, biases = zip(*_selected_rows(prepared, codes, block, dtype), strict=True)
    groups = [len(bias) for bias in biases]
    rows = max(1, PART // max(sum(groups), 1))
    for start in range(0, len(tokens), rows):
        part = tokens[start : start + rows]
        queries = (prepared.scale * prepared.q[b, h, part].double()).to(dtype)  # unscaled, fp32 overflows sooner
        logits = [queries @ level.T + bias for level, bias in zip(keys, biases, strict=True)]
        weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1).split_with_sizes(groups, dim=-1)
        sums = [weight @ level for weight, level in zip(weights, values, strict=True)]
        out[b, h, part] = torch.stack(sums).sum(0).to(out.dtype)


def _selected_rows(
    prepared: Prepared, codes: Tensor, block: tuple[int, int, int], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values and logit bias of what one query block attends to at each level."""
    b, h, i = block
    for level in prepared.pyramid:
        chosen = (codes == level.group_size.bit_length() - 1)[:, None] & (level.counts > 0)
        groups = chosen.flatten().nonzero().squeeze(1)
        bias = level.counts.flatten()[groups].to(dtype).log()
        if level.group_size > 1 and prepared.config.variance_term:
            squares = prepared.query_squares[b, h, i : i + 1]
            variance = logit_variance(squares, level.key_variance[b, h], prepared.scale).squeeze(0)
            term = bias_from_variance(variance, LEVEL_BIAS_CLAMP).to(dtype)
            bias = bias + term[groups // level.counts.shape[1]]
        keys, values = (x[b, h].flatten(0, 1)[groups].to(dtype) for x in (level.keys, level.values))
        yield keys, values, bias


def _sizes(config: PSAConfig) -> list[int]:
    """Group sizes of the pyramid."""
    return sorted({1, *config.group_sizes})


def _precision(dtype: torch.dtype) -> torch.dtype:
    """What is attended in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _places(table: BlockTable) -> Tensor:
    """Token at every place of every block ``[blocks, size]``; -1 where there is none."""
    return table.tokens.view(-1, table.size)


def _parts(blocks: int, elements: int) -> list[slice]:
    """All blocks in turn, as many at a time as ``PART`` holds of so many elements each."""
    size = max(1, PART // elements)
    return [slice(first, min(first + size, blocks)) for first in range(0, blocks, size)]


def _elements_at_a_time(blocks: int, elements: int) -> int:
    return min(blocks, max(1, PART // elements)) * elements


def _elements_to_pool(table: BlockTable, head_dim: int) -> int:
    return table.size * head_dim


def _elements_to_estimate(order: TokenOrder, config: PSAConfig, head_dim: int) -> int:
    return order.queries.size // config.importance_stride * max(order.keys.blocks * config.importance_parts, head_dim)


def _elements_to_select(order: TokenOrder, config: PSAConfig) -> int:
    return max(order.keys.video_blocks, 1) * len(config.levels)
