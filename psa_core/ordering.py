"""The order in which tokens are laid out, and how it is cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import PSAConfig
from .curves import gilbert_curve, raster_curve, tile_curve
from .layout import Grid, TokenLayout


@dataclass(frozen=True)
class BlockTable:
    """Blocks of a token order: first those of video tokens, then those of exact tokens; none holds both.

    Args:
        size: Places of a block. The last video block and the last exact one may have fewer tokens than places.
        video_blocks: Number of blocks that hold video tokens.
        exact_blocks: Number of blocks that hold exact tokens.
        tokens: Index of the token at every place ``[blocks * size]``, int32; -1 where a place is empty.
        counts: Tokens of every block ``[blocks]``, int32, from 1 to ``size``.
        last_video_count: Tokens of the last video block, as a plain number (``size`` when there is none).
    """

    size: int
    video_blocks: int
    exact_blocks: int
    tokens: Tensor
    counts: Tensor
    last_video_count: int

    @property
    def blocks(self) -> int:
        """Number of blocks of both kinds."""
        return self.video_blocks + self.exact_blocks


@dataclass(frozen=True)
class TokenOrder:
    """Index tables of one layout on one device, planned once and used by many calls.

    Args:
        layout: The layout that was planned.
        curve: What the order depends on in a config: order, tile, query block, key block.
        queries: Blocks of query rows.
        keys: Blocks of key rows.
    """

    layout: TokenLayout
    curve: tuple[object, ...]
    queries: BlockTable
    keys: BlockTable

    def fits(self, layout: TokenLayout, config: PSAConfig, device: torch.device) -> bool:
        """Whether these tables are those of the layout, config and device."""
        same_device = self.keys.tokens.device == _concrete(device)
        return same_device and self.layout == layout and self.curve == _curve_settings(config)


def order_tokens(layout: TokenLayout, config: PSAConfig, device: torch.device) -> TokenOrder:
    """Plan the order of a layout.

    Args:
        layout: Where the video is among the tokens.
        config: ``order``, ``tile``, ``query_block`` and ``key_block`` are used.
        device: Where the tables are to be.
    """
    video, exact = _split_tokens(layout, config)
    device = _concrete(device)
    return TokenOrder(
        layout=layout,
        curve=_curve_settings(config),
        queries=_cut_into_blocks(video, exact, config.query_block, device),
        keys=_cut_into_blocks(video, exact, config.key_block, device),
    )


def _split_tokens(layout: TokenLayout, config: PSAConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Video tokens along the curve, one video after the other, and exact tokens in their own order."""
    video = np.concatenate([_curve(grid, config) + start for start, grid in layout.videos])
    is_exact = np.ones(layout.tokens, dtype=bool)
    is_exact[video] = False
    for start, stop in layout.exact_spans:
        is_exact[start:stop] = True
    return video[~is_exact[video]], np.flatnonzero(is_exact)


def _curve(grid: Grid, config: PSAConfig) -> NDArray[np.int64]:
    if config.order == "gilbert":
        return gilbert_curve(grid)
    if config.order == "tile":
        return tile_curve(grid, config.tile_shape)
    return raster_curve(grid)


def _cut_into_blocks(video: NDArray[np.int64], exact: NDArray[np.int64], size: int, device: torch.device) -> BlockTable:
    blocks = [-(-len(part) // size) for part in (video, exact)]
    tokens = np.full(sum(blocks) * size, -1, dtype=np.int32)
    tokens[: len(video)] = video
    tokens[blocks[0] * size : blocks[0] * size + len(exact)] = exact
    return BlockTable(
        size=size,
        video_blocks=blocks[0],
        exact_blocks=blocks[1],
        tokens=torch.from_numpy(tokens).to(device),
        counts=torch.from_numpy((tokens >= 0).reshape(-1, size).sum(1, dtype=np.int32)).to(device),
        last_video_count=(len(video) - 1) % size + 1 if len(video) else size,
    )


def _curve_settings(config: PSAConfig) -> tuple[object, ...]:
    tile = config.tile_shape if config.order == "tile" else None
    return config.order, tile, config.query_block, config.key_block


def _concrete(device: torch.device) -> torch.device:
    """A device with its index, so that ``cuda`` and ``cuda:0`` compare equal."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
