"""Queries, keys and values that behave like a video model's, made from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

ROPE_BASE = 10_000.0
WAVES = 48


def structured(
    grid: tuple[int, int, int], heads: int, head_dim: int, *, seed: int, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic self-attention of a video: smooth content, noise, and 3-D rotary positions.

    Every head sees the same smooth field (a sum of plane waves over time, height and width) through projections of
    its own, mixed with a constant vector that rotary positions turn into locality, and with white noise. Sharpness
    grows from the first head to the last.

    Returns:
        q, k, v ``[1, heads, T*H*W, head_dim]``.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    t, h, w = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    positions = torch.cartesian_prod(t, h, w)  # [N, 3]
    waves = normal(3, WAVES) * torch.tensor([[0.10], [0.16], [0.16]], device=device)
    field = torch.cos(positions @ waves + 6.2832 * torch.rand(WAVES, generator=generator, device=device))
    angles = _rope_angles(positions, head_dim)
    tokens = positions.shape[0]
    q, k, v = (torch.empty(1, heads, tokens, head_dim, device=device, dtype=dtype) for _ in range(3))
    for head in range(heads):
        sharpness = 0.6 + 1.2 * head / max(heads - 1, 1)
        project = normal(WAVES, head_dim) * WAVES**-0.5
        anchor = normal(head_dim)
        for out, noise in ((q, 0.5), (k, 0.5)):
            content = anchor + field @ (project + 0.3 * normal(WAVES, head_dim) * WAVES**-0.5) * 1.4
            out[0, head] = _rotate(sharpness * (content + noise * normal(tokens, head_dim)), angles).to(dtype)
        v[0, head] = (field @ normal(WAVES, head_dim) * WAVES**-0.5 * 1.4 + 0.5 * normal(tokens, head_dim)).to(dtype)
    return q, k, v


def _rope_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Rotation of every pair of dimensions ``[N, head_dim / 2]``: a third each for time, height and width."""
    pairs = head_dim // 2
    spatial = pairs // 3
    parts = []
    for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial)):
        frequencies = ROPE_BASE ** -(torch.arange(count, device=positions.device) / count)
        parts.append(positions[:, axis, None] * frequencies)
    return torch.cat(parts, dim=1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    pairs = x.view(*x.shape[:-1], -1, 2)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos), dim=-1)
    return turned.flatten(-2)
