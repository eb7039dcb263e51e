"""Queries, keys and values of the demo's video model, captured while it renders natural clips."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "demo" / "prompt_node")]

from prompts import EMPTY, embed  # noqa: E402

from train import shifted  # noqa: E402
from wan import LATENT_CHANNELS, PATCH, Attention, WanSize, WanTransformer  # noqa: E402

CHECKPOINT = ROOT / "demo" / "weights" / "wan_demo.safetensors"
SUBJECTS = ("bunny", "driver", "cyclist")  # the natural clips
STEPS = 20


def capture(
    grid: tuple[int, int, int], noises: tuple[float, ...], *, seed: int, device: torch.device | str, dtype: torch.dtype
) -> dict[float, tuple[Tensor, Tensor, Tensor]]:
    """Self-attention of every block and head of the model, for three natural subjects, on the way from noise to video.

    Args:
        grid: Tokens of the video along time, height, width. The model was trained on (13, 16, 24).
        noises: Noise levels (sigma) to capture at; the sampler's nearest one is taken.
        seed: Of the starting noise.

    Returns:
        For every noise level q, k, v ``[1, subjects * blocks * heads, T*H*W, 128]``.
    """
    model = load_model().to(device)
    sigmas = shifted(torch.linspace(1, 0, STEPS + 1)).tolist()
    wanted = {min(sigmas[:-1], key=lambda sigma: abs(sigma - noise)): noise for noise in noises}
    captured: dict[float, list[tuple[Tensor, ...]]] = {noise: [] for noise in noises}
    height, width = grid[1] * PATCH[1], grid[2] * PATCH[2]
    for index, subject in enumerate(SUBJECTS):
        generator = torch.Generator().manual_seed(seed + index)
        latent = torch.randn(1, LATENT_CHANNELS, grid[0], height, width, generator=generator).to(device)
        text = embed((subject, EMPTY))[None].to(device)
        for now, after in itertools.pairwise(sigmas):
            keep = captured[wanted[now]] if now in wanted else None
            latent = latent + (after - now) * _velocity(model, latent, now, text, keep, dtype)
    return {noise: (_stack(parts, 0), _stack(parts, 1), _stack(parts, 2)) for noise, parts in captured.items()}


def load_model(checkpoint: Path = CHECKPOINT) -> WanTransformer:
    """A transformer that demo/train.py trained; by default the demo's."""
    weights = {name: value.float() for name, value in load_file(checkpoint).items()}
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    model = WanTransformer(
        WanSize(weights["head.modulation"].shape[-1], layers, weights["blocks.0.ffn.0.weight"].shape[0])
    )
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def _velocity(
    model: WanTransformer,
    latent: Tensor,
    sigma: float,
    text: Tensor,
    keep: list[tuple[Tensor, ...]] | None,
    dtype: torch.dtype,
) -> Tensor:
    """One call of the model, whose self-attention is noted in ``keep`` if there is one."""

    def note(attention: Attention, arguments: tuple[Tensor, ...]) -> None:
        assert keep is not None
        keep.append(tuple(part.to(dtype) for part in attention.project(*arguments)))

    hooks = [block.self_attn.register_forward_pre_hook(note) for block in model.blocks] if keep is not None else []
    try:
        return model(latent, torch.tensor([1000 * sigma], device=latent.device), text)
    finally:
        for hook in hooks:
            hook.remove()


def _stack(parts: list[tuple[Tensor, ...]], index: int) -> Tensor:
    """Heads of all captures side by side, in the memory layout in which ComfyUI passes them."""
    return torch.cat([part[index] for part in parts], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
