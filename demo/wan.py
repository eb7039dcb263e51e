"""Wan's text-to-video transformer and its video decoder, small, with the parameter names that ComfyUI reads.

Source: Wan, arXiv:2503.20314; the names are those of the published Wan 2.1 checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

LATENT_CHANNELS = 16
TEXT_DIM = 4096
TIME_DIM = 256
HEAD_DIM = 128
PATCH = (1, 2, 2)
# Per-channel statistics of Wan 2.1's latents: ComfyUI hands the decoder `latent * std + mean`.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class WanSize:
    """Width of the residual stream (a multiple of the head dim 128), number of blocks, width of the feed-forward."""

    dim: int = 256
    layers: int = 3
    ffn_dim: int = 704

    def __post_init__(self) -> None:
        if self.dim < HEAD_DIM or self.dim % HEAD_DIM:
            raise ValueError(f"dim: {self.dim} is not a multiple of {HEAD_DIM}")

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM


def rotary_angles(grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[T*H*W, 64]`` of every token's rotation, for a grid ``(T, H, W)`` of tokens.

    22 pairs of channels turn with time, 21 with height, 21 with width.
    """
    axis_dims = (HEAD_DIM - 4 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6))
    parts = []
    for axis, (length, dim) in enumerate(zip(grid, axis_dims, strict=True)):
        speed = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * speed
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        parts.append(angle.view(shape).expand(*grid, dim // 2))
    angles = torch.cat(parts, dim=-1).flatten(0, 2)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channels of ``[B, N, H, D]`` as pairs."""
    cos, sin = (part[:, None] for part in angles)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; rotates them if given angles."""

    def __init__(self, size: WanSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.q, self.k, self.v, self.o = (nn.Linear(size.dim, size.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(size.dim, eps=1e-6) for _ in range(2))

    def project(
        self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, H, N, 128]`` of ``x`` attending to ``context``."""
        v = self.v(context)
        q, k = self.norm_q(self.q(x)).to(v.dtype), self.norm_k(self.k(context)).to(v.dtype)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        out = functional.scaled_dot_product_attention(*self.project(x, context, angles))
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward; time steers the first and last."""

    def __init__(self, size: WanSize) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, size.dim) * size.dim**-0.5)
        self.norm1, self.norm2 = (nn.LayerNorm(size.dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(size.dim, eps=1e-6)
        self.self_attn, self.cross_attn = Attention(size), Attention(size)
        self.ffn = nn.Sequential(
            nn.Linear(size.dim, size.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(size.ffn_dim, size.dim)
        )

    def forward(self, x: Tensor, time: Tensor, context: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time).chunk(6, dim=1)
        normed = self.norm1(x) * (1 + scale) + shift
        x = x + self.self_attn(normed, normed, angles) * gate
        x = x + self.cross_attn(self.norm3(x), context)
        return x + self.ffn(self.norm2(x) * (1 + ffn_scale) + ffn_shift) * ffn_gate


class Head(nn.Module):
    """Last projection, from tokens to patches of the velocity."""

    def __init__(self, size: WanSize) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(size.dim, LATENT_CHANNELS * PATCH[1] * PATCH[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, size.dim) * size.dim**-0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, None]).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanTransformer(nn.Module):
    """Wan 2.1's text-to-video transformer: predicts the velocity ``noise - video`` of a noisy latent."""

    def __init__(self, size: WanSize) -> None:
        super().__init__()
        dim = size.dim
        self.patch_embedding = nn.Conv3d(LATENT_CHANNELS, dim, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(TEXT_DIM, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(TIME_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.head = Head(size)
        nn.init.zeros_(self.head.head.weight)  # the first guess is "no velocity", not noise

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Velocity of every latent value.

        Args:
            latent: Noisy latent ``[B, 16, T, H, W]``; H and W even.
            timestep: Noise level ``[B]``, sigma times 1000.
            text: Prompt embedding ``[B, L, 4096]``.

        Returns:
            Velocity, shaped as ``latent``, fp32.
        """
        tokens = self.patch_embedding(latent)
        grid = tuple(tokens.shape[2:])
        x = tokens.flatten(2).transpose(1, 2).float()
        time = self.time_embedding(_sinusoids(timestep)).float()
        modulation = self.time_projection(time).float().unflatten(1, (6, -1))
        context = self.text_embedding(text)
        angles = rotary_angles(grid, latent.device)
        for block in self.blocks:
            x = block(x, modulation, context, angles)
        patches = self.head(x, time).float().unflatten(1, grid).unflatten(-1, (*PATCH, LATENT_CHANNELS))
        # [B, T, H, W, pt, ph, pw, C] -> [B, C, T, pt, H, ph, W, pw]
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(latent.shape)


def _sinusoids(timestep: Tensor) -> Tensor:
    half = TIME_DIM // 2
    speed = 10000.0 ** -(torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angle = timestep.float()[:, None] * speed
    return torch.cat((angle.cos(), angle.sin()), dim=1)


class CausalConv(nn.Conv3d):
    """3-D convolution that sees no later frame."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0)))


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of a video (``axes`` 3) or a picture (``axes`` 2)."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        at_least_fp32 = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=at_least_fp32).clamp_min(1e-12)
        return x * (x.shape[1] ** 0.5 / length).to(x.dtype) * self.gamma.to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(inputs, 3),
            nn.SiLU(),
            CausalConv(inputs, outputs, (3, 3, 3)),
            ChannelNorm(outputs, 3),
            nn.SiLU(),
            nn.Identity(),  # dropout in the published model: it keeps the numbering
            CausalConv(outputs, outputs, (3, 3, 3)),
        )
        self.shortcut = CausalConv(inputs, outputs, (1, 1, 1)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class FrameAttention(nn.Module):
    """Single-head attention inside every frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        out = functional.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(frames.shape)
        return x + self.proj(out).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Upsample(nn.Module):
    """Double height and width and halve the channels; with ``in_time`` double every frame but the first."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor) -> Tensor:
        if self.time_conv is not None and x.shape[2] > 1:
            doubled = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
            x = torch.cat((x[:, :, :1], doubled.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)), dim=2)
        frames = self.resample(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class WanDecoder(nn.Module):
    """Wan 2.1's decoder: ``[B, 16, T, H, W]`` latents to ``[B, 3, 4T-3, 8H, 8W]`` pixels in -1..1.

    ``conv2`` lies outside the decoder in the published checkpoints, hence the nesting here.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv2 = CausalConv(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
        self.decoder = nn.Module()
        wide = 4 * width
        self.decoder.conv1 = CausalConv(LATENT_CHANNELS, wide, (3, 3, 3))
        self.decoder.middle = nn.Sequential(ResidualBlock(wide, wide), FrameAttention(wide), ResidualBlock(wide, wide))
        stages: list[nn.Module] = []
        for inputs, outputs, upsample in (
            (wide, wide, Upsample(wide, in_time=True)),
            (wide // 2, wide, Upsample(wide, in_time=True)),
            (wide // 2, wide // 2, Upsample(wide // 2, in_time=False)),
            (width, width, None),
        ):
            stages += [ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(3)]
            stages += [upsample] if upsample is not None else []
        self.decoder.upsamples = nn.Sequential(*stages)
        self.decoder.head = nn.Sequential(ChannelNorm(width, 3), nn.SiLU(), CausalConv(width, 3, (3, 3, 3)))

    @torch.no_grad()
    def fold_input(self, scale: Tensor, shift: Tensor) -> None:
        """Let the first layer take ``x`` where it took ``scale * x + shift``; both hold one value per channel."""
        weight = self.conv2.weight.flatten(1)
        self.conv2.bias += weight @ shift
        self.conv2.weight *= scale.view(1, -1, 1, 1, 1)

    def forward(self, latent: Tensor) -> Tensor:
        d = self.decoder
        return d.head(d.upsamples(d.middle(d.conv1(self.conv2(latent)))))


class ClipEncoder(nn.Module):
    """Training-time encoder; only its decoder is published.

    The 16 numbers of a latent position are scaled to a root mean square of 1, so that noise means the same everywhere
    and no statistic of a batch is needed while training. ``mean`` and ``std`` are set when training is over and make
    every channel a standard one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.Conv3d(3 * 4 * 8 * 8, hidden, (1, 3, 3), padding=(0, 1, 1)),
            nn.SiLU(),
            nn.Conv3d(hidden, LATENT_CHANNELS, 1),
        )
        shape = (1, LATENT_CHANNELS, 1, 1, 1)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def forward(self, video: Tensor) -> Tensor:
        """``[B, 3, 4T-3, 8H, 8W]`` in -1..1 to ``[B, 16, T, H, W]``; the first frame stands four times."""
        whole = torch.cat((video[:, :, :1].expand(-1, -1, 3, -1, -1), video), dim=2)
        b, c, t, h, w = whole.shape
        cells = whole.view(b, c, t // 4, 4, h // 8, 8, w // 8, 8).permute(0, 1, 3, 5, 7, 2, 4, 6)
        mixed = self.mix(cells.reshape(b, -1, t // 4, h // 8, w // 8))
        latent = functional.normalize(mixed, dim=1) * LATENT_CHANNELS**0.5
        return (latent - self.mean) / self.std
