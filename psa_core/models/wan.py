"""Wan 2.1 and 2.2: what tells the models apart, and their official sampling settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

PATCH_SIZE = (1, 2, 2)
"""Latent frames, rows and columns that become one token."""

HEAD_DIM = 128


@dataclass(frozen=True)
class WanFamily:
    """One size of Wan.

    Args:
        preset_family: Name of its preset file.
        title: What people call it.
        dim: Width of the transformer.
        blocks: Number of transformer blocks.
        in_channels: Channels that go in: text to video, image to video where there is one.
        out_channels: Latent channels of its VAE.
        vae_stride: Frames, rows and columns of video that become one latent position.
        official_steps: Sampling steps of the official text-to-video inference code.
    """

    preset_family: str
    title: str
    dim: int
    blocks: int
    in_channels: tuple[int, ...]
    out_channels: int
    vae_stride: tuple[int, int, int]
    official_steps: int


WAN21_1_3B = WanFamily("wan2.1_1.3b", "Wan 2.1 1.3B", 1536, 30, (16, 36), 16, (4, 8, 8), 50)
WAN21_14B = WanFamily("wan2.1_14b", "Wan 2.1 14B", 5120, 40, (16, 36), 16, (4, 8, 8), 50)
WAN22_5B = WanFamily("wan2.2_5b", "Wan 2.2 5B", 3072, 30, (48,), 48, (4, 16, 16), 50)
WAN22_A14B = WanFamily("wan2.2_a14b", "Wan 2.2 A14B", 5120, 40, (16, 36), 16, (4, 8, 8), 40)

FAMILIES = (WAN21_1_3B, WAN21_14B, WAN22_5B, WAN22_A14B)


def detect_family(dim: int, blocks: int, out_channels: int) -> tuple[WanFamily, str]:
    """Find the family of a Wan model by its size.

    Input channels do not count: fine-tunes add control and mask channels of their own.

    Args:
        dim: Width of the transformer.
        blocks: Number of transformer blocks.
        out_channels: Latent channels that it predicts.

    Returns:
        The family, and a note for the user where it is not the only answer (empty otherwise). Wan 2.1 14B and
        Wan 2.2 A14B have the same architecture and are both taken for the former; a size that nobody released goes
        to the family of the nearest width.
    """
    size = (dim, blocks, out_channels)
    matches = [family for family in FAMILIES if (family.dim, family.blocks, family.out_channels) == size]
    if not matches:
        nearest = min(FAMILIES, key=lambda family: abs(math.log(family.dim / dim)))
        return nearest, f"no released Wan has width {dim} and {blocks} blocks; {nearest.title} is the nearest"
    if len(matches) > 1:
        others = " and ".join(family.title for family in matches[1:])
        return matches[0], f"{others} has the same architecture; for its presets use PSA Preset Loader"
    return matches[0], ""
