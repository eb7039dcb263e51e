"""Wan 2.1 and 2.2: what tells the models apart, and their official sampling settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

HEAD_DIM = 128


@dataclass(frozen=True)
class WanFamily:
    """One size of Wan.

    Args:
        preset_family: Name of its preset file.
        title: What people call it.
        dim: Width of the transformer.
        blocks: Number of transformer blocks.
        out_channels: Latent channels of its VAE.
        official_steps: Sampling steps of the official text-to-video inference code.
    """

    preset_family: str
    title: str
    dim: int
    blocks: int
    out_channels: int
    official_steps: int


WAN21_1_3B = WanFamily("wan2.1_1.3b", "Wan 2.1 1.3B", 1536, 30, 16, 50)
WAN21_14B = WanFamily("wan2.1_14b", "Wan 2.1 14B", 5120, 40, 16, 50)
WAN22_5B = WanFamily("wan2.2_5b", "Wan 2.2 5B", 3072, 30, 48, 50)
WAN22_A14B = WanFamily("wan2.2_a14b", "Wan 2.2 A14B", 5120, 40, 16, 40)

FAMILIES = (WAN21_1_3B, WAN21_14B, WAN22_5B, WAN22_A14B)


@dataclass(frozen=True)
class Detected:
    """What a size of Wan is taken for.

    Args:
        family: The family of that size, else the one of the nearest width.
        others: Further families of that size, which only their weights tell from it.
        is_released: Whether anyone has released a Wan of that size.
    """

    family: WanFamily
    others: tuple[WanFamily, ...] = ()
    is_released: bool = True


def detect_family(dim: int, blocks: int, out_channels: int) -> Detected:
    """Find the family of a Wan model by its size.

    Input channels do not count: fine-tunes add control and mask channels of their own.

    Args:
        dim: Width of the transformer.
        blocks: Number of transformer blocks.
        out_channels: Latent channels that it predicts.
    """
    size = (dim, blocks, out_channels)
    same = [family for family in FAMILIES if (family.dim, family.blocks, family.out_channels) == size]
    if same:
        return Detected(same[0], tuple(same[1:]))
    return Detected(min(FAMILIES, key=lambda family: abs(math.log(family.dim / dim))), is_released=False)
