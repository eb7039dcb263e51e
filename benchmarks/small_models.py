"""Small video models as demo/train.py leaves them: whole videos, with any self-attention put in place of their own."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.learned import load_model
from clips import CLIP_SETS
from prompt_node.prompts import EMPTY, embed
from train import SHIFT, shifted
from wan import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, PATCH, Attention, WanDecoder, WanTransformer

TRANSFORMER, DECODER, RECORD = "wan_demo.safetensors", "wan_demo_vae.safetensors", "train.json"

Grid = tuple[int, int, int]


class VideoAttention(Protocol):
    """Answers the self-attention calls of one video."""

    percent: float  # share of the sampling that is done, 0 to 1; set before every step

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        """Attention of ``[B, H, N, D]`` in the transformer block of that index."""
        ...


@dataclass
class SmallModel:
    """A transformer and its decoder on one device.

    Args:
        name: What the records call it.
        transformer: Its self-attention is answered by what :meth:`sample` is given.
        decoder: Takes latents as ComfyUI hands them over.
        subjects: What it was trained on.
        checkpoint: First digits of the SHA-256 of the transformer's file.
    """

    name: str
    transformer: WanTransformer
    decoder: WanDecoder
    subjects: tuple[str, ...]
    checkpoint: str

    @staticmethod
    def load(name: str, folder: Path, device: torch.device) -> SmallModel:
        """Read what a training wrote into a folder; linear layers work in bf16 on CUDA."""
        missing = [file for file in (TRANSFORMER, DECODER, RECORD) if not (folder / file).is_file()]
        if missing:
            raise ValueError(f"model {name}: {folder} lacks {', '.join(missing)}")
        transformer = load_model(folder / TRANSFORMER).to(device)
        for index, block in enumerate(transformer.blocks):
            block.self_attn = _ReplacedAttention(block.self_attn, index)
        if device.type == "cuda":  # autocast would cast their weights in every call
            for layer in transformer.modules():
                if isinstance(layer, (nn.Linear, nn.Conv3d)):
                    layer.bfloat16()
        weights = load_file(folder / DECODER)
        decoder = WanDecoder(weights["decoder.head.0.gamma"].shape[0])
        decoder.load_state_dict({key: value.float() for key, value in weights.items() if "encoder" not in key})
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        digest = hashlib.sha256((folder / TRANSFORMER).read_bytes()).hexdigest()
        subjects = CLIP_SETS[record.get("clip_set", "first")].subjects
        return SmallModel(name, transformer, decoder.to(device).eval(), subjects, digest[:12])

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.transformer.parameters()).device

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.transformer.blocks)

    @property
    def heads(self) -> int:
        """Number of attention heads, of 128 channels each."""
        return int(self.transformer.blocks[0].self_attn.attention.heads)

    def attention_flops(self, grid: Grid) -> float:
        """FLOPs of dense self-attention in one call for one video."""
        tokens = grid[0] * grid[1] * grid[2]
        return 4.0 * tokens**2 * 128 * self.heads * self.blocks

    def other_flops(self, grid: Grid) -> float:
        """FLOPs of the blocks' linear layers in one call for one video."""
        weights = sum(p.numel() for p in self.transformer.blocks.parameters() if p.dim() == 2)
        return 2.0 * grid[0] * grid[1] * grid[2] * weights

    def noise(self, grid: Grid, seed: int) -> Tensor:
        """The latent ``[1, 16, T, 2H, 2W]`` that a seed starts from, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, LATENT_CHANNELS, grid[0], grid[1] * PATCH[1], grid[2] * PATCH[2])
        return torch.randn(shape, generator=generator).to(self.device)

    def text(self, subject: str, cfg: float) -> Tensor:
        """Conditions of a call ``[conditions, 2, 4096]``: the subject, with guidance (``cfg`` not 1) none too."""
        words = [(subject, EMPTY), (EMPTY, EMPTY)] if cfg != 1 else [(subject, EMPTY)]
        return torch.stack([embed(pair) for pair in words]).to(self.device)

    @torch.no_grad()
    def sample(self, noise: Tensor, subject: str, steps: int, cfg: float, attend: VideoAttention) -> Tensor:
        """Latent of a video, by Euler's method along the learned flow, with Wan's time shift."""
        sigmas = shifted(torch.linspace(1, 0, steps + 1)).tolist()
        text, latent = self.text(subject, cfg), noise
        for now, after in itertools.pairwise(sigmas):
            attend.percent = percent_of(now)
            latent = latent + (after - now) * self.velocity(latent, now, text, cfg, attend)
        return latent

    @torch.no_grad()
    def velocity(self, latent: Tensor, sigma: float, text: Tensor, cfg: float, attend: VideoAttention) -> Tensor:
        """One call of the transformer, all conditions in one batch."""
        timestep = torch.full((len(text),), 1000 * sigma, device=latent.device)
        for block in self.transformer.blocks:
            block.self_attn.attend = attend
        with torch.autocast(latent.device.type, torch.bfloat16, enabled=latent.device.type == "cuda"):
            velocity: Tensor = self.transformer(latent.expand(len(text), -1, -1, -1, -1), timestep, text)
        if len(text) == 1:
            return velocity
        wanted, empty = velocity.chunk(2)
        return empty + cfg * (wanted - empty)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Any:
        """Pictures ``[frames, height, width, 3]`` of a latent, 0 to 1, fp32, as a NumPy array."""
        mean, std = (
            torch.tensor(part, device=latent.device).view(1, -1, 1, 1, 1) for part in (LATENT_MEAN, LATENT_STD)
        )
        video = self.decoder(latent * std + mean)[0]
        return ((video + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).contiguous().cpu().numpy()


class _ReplacedAttention(nn.Module):
    """A block's self-attention whose queries, keys and values go to somebody else."""

    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]

    def __init__(self, attention: Attention, block: int) -> None:
        super().__init__()
        self.attention, self.block = attention, block

    def forward(self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.attention.project(x, context, angles)
        with torch.autocast(x.device.type, enabled=False):  # in ComfyUI there is none, which would round PSA's sums
            out = self.attend(q, k, v, self.block)
        return self.attention.o(out.transpose(1, 2).flatten(2))


def percent_of(sigma: float) -> float:
    """Share of the sampling that is done at a noise level: what ComfyUI's ``percent_to_sigma`` inverts."""
    return 1 - sigma / (SHIFT - (SHIFT - 1) * sigma)
