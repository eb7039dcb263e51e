"""The order of keys inside their blocks: alike keys side by side, so that what is averaged is alike."""

from __future__ import annotations

import torch
from torch import Tensor

from .ordering import BlockTable

POWER_ITERATIONS = 2


def full_video_blocks(table: BlockTable) -> int:
    """Number of video blocks without an empty place. They come first; only they are sorted."""
    return table.video_blocks - (table.last_video_count < table.size)


def sort_by_content(keys: Tensor, full: int) -> Tensor:
    """Sort the keys of blocks by a tree of median splits.

    A node of n places is split in two halves along the direction in which its keys vary most, and each half again,
    down to pairs. That direction is found by two power iterations from the node's first key; keys that lie equally far
    along it keep their order. Blocks, and with them the output at level 1, stay what they are.

    Args:
        keys: Keys in blocks ``[B, H, blocks, size, D]``. A shift of all keys of a head changes nothing.
        full: So many of the blocks, the first ones, are sorted; the others, ragged or exact, stay as they are.

    Returns:
        For every place the place whose key it gets ``[B, H, blocks, size]``, int64.
    """
    size = keys.shape[3]
    places = torch.arange(size, device=keys.device).expand(keys.shape[:4]).clone()
    if full <= 0:
        return places
    sorted_places, sorted_keys = places[:, :, :full], keys[:, :, :full]
    while size > 2:
        nodes = _cut(sorted_keys, size)  # [B, H, blocks, nodes, size, D]
        order = _along_greatest_variance(nodes).argsort(dim=-1, stable=True)
        sorted_keys = nodes.gather(4, order[..., None].expand_as(nodes)).flatten(3, 4)
        sorted_places = _cut(sorted_places, size).gather(4, order).flatten(3, 4)
        size //= 2
    places[:, :, :full] = sorted_places
    return places


def rearrange(blocks: Tensor, places: Tensor) -> Tensor:
    """Put what is in blocks ``[B, H, blocks, size, D]`` into the order of ``places`` ``[B, H, blocks, size]``."""
    return blocks.gather(3, places[..., None].expand_as(blocks))


def _cut(blocks: Tensor, size: int) -> Tensor:
    """Blocks ``[B, H, blocks, places, ...]`` cut into nodes of so many places."""
    return blocks.reshape(*blocks.shape[:3], -1, size, *blocks.shape[4:])


def _along_greatest_variance(nodes: Tensor) -> Tensor:
    """How far each key of a node ``[..., size, D]`` lies along the direction of the node's greatest variance."""
    centred = nodes - nodes.mean(dim=-2, keepdim=True)
    direction = centred[..., :1, :]
    for _ in range(POWER_ITERATIONS):
        direction = (centred @ direction.transpose(-1, -2)).transpose(-1, -2) @ centred
        direction = torch.nn.functional.normalize(direction, dim=-1, eps=torch.finfo(nodes.dtype).tiny)
    return (centred @ direction.transpose(-1, -2)).squeeze(-1)
