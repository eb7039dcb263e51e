"""CogVideoX: what tells the models apart, and the positions that some of them have as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

HEAD_DIM = 64

TEXT_TOKENS = 226
"""Length that the official text encoding pads to; the text comes before the video."""

TABLE_GRID = (13, 30, 45)
"""Tokens along time, height and width of the position tables of CogVideoX-2B and of CogVideoX-5B image to video: 49
frames of 720x480. These models know no other resolution."""

TABLE_SPATIAL_SCALE = 1.875
"""What CogVideoX-2B's position table divides rows and columns by."""


@dataclass(frozen=True)
class CogVideoXFamily:
    """One size of CogVideoX.

    Args:
        preset_family: Name of its preset file.
        title: What people call it.
        heads: Attention heads of 64 dimensions each.
        blocks: Number of transformer blocks.
        patch_size: Latent frames, rows and columns that become one token.
    """

    preset_family: str
    title: str
    heads: int
    blocks: int
    patch_size: tuple[int, int, int]


COGVIDEOX_2B = CogVideoXFamily("cogvideox_5b", "CogVideoX-2B", 30, 30, (1, 2, 2))
COGVIDEOX_5B = CogVideoXFamily("cogvideox_5b", "CogVideoX-5B", 48, 42, (1, 2, 2))
COGVIDEOX15_5B = CogVideoXFamily("cogvideox1.5_5b", "CogVideoX1.5-5B", 48, 42, (2, 2, 2))

FAMILIES = (COGVIDEOX_2B, COGVIDEOX_5B, COGVIDEOX15_5B)


@dataclass(frozen=True)
class Detected:
    """What a size of CogVideoX is taken for.

    Args:
        family: The family of that size, else the one of the same patch and the nearest width.
        is_released: Whether anyone has released a CogVideoX of that size.
    """

    family: CogVideoXFamily
    is_released: bool


def detect_family(heads: int, blocks: int, patch_frames: int) -> Detected:
    """Find the family of a CogVideoX model by its size.

    Input channels do not count: fine-tunes add control and mask channels of their own.

    Args:
        heads: Attention heads.
        blocks: Number of transformer blocks.
        patch_frames: Latent frames that become one token: 1 before CogVideoX1.5, 2 from there on.
    """
    same_patch = [family for family in FAMILIES if family.patch_size[0] == patch_frames] or list(FAMILIES)
    nearest = min(same_patch, key=lambda family: abs(math.log(family.heads / heads)))
    size = (nearest.heads, nearest.blocks, nearest.patch_size[0])
    return Detected(nearest, is_released=size == (heads, blocks, patch_frames))
