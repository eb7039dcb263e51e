"""Whether a backend computes what it should on this machine, asked once before it is trusted with a video."""

from __future__ import annotations

import platform
import sys
from functools import cache

import torch
from torch import Tensor

from .attention import plan_order, psa_attention
from .backends import resolve
from .config import PSAConfig
from .layout import TokenLayout
from .ordering import TokenOrder

GRID = (5, 16, 17)  # 1360 tokens: 21 full key blocks and a ragged one
TEXT_TOKENS = 40
SEED = 20251204
LIMITS = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-6}


class SelfCheckFailed(RuntimeError):
    """A backend's result is not that of dense attention where it must be."""


@cache
def self_check(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str) -> None:
    """Compare a backend with dense attention on a small seeded input, at every level of the pyramid at once.

    Keys and values are equal within groups of 1, 2, 4, 8 tokens or a whole block, in turn from block to block.
    Averaging equal tokens loses nothing, so the right selection takes all the levels, and the right result is that of
    dense attention.

    Args:
        device: Where to compute.
        dtype: Of queries, keys and values.
        head_dim: 64 or 128.
        backend: ``triton`` or ``reference``.

    Raises:
        SelfCheckFailed: with what was expected, what came out, and what to report.
    """
    layout = TokenLayout(GRID, video_start=TEXT_TOKENS)
    config = PSAConfig(error_weight=1e-3)
    order = plan_order(layout, config, device)
    q, k, v = _inputs(layout, order, head_dim, device, dtype)
    resolve(backend, q).warm_up(q, k, v, order, config, head_dim**-0.5)
    out, stats = psa_attention(q, k, v, layout=layout, config=config, backend=backend, order=order, stats=True)
    exact = _dense(q.double(), k.double(), v.double())  # fp64: no setting of the user's makes it less than exact
    error = float((out.double() - exact).norm() / exact.norm())
    pairs = stats.level_pairs.sum(dim=(0, 1)).tolist()
    case = f"self-check of backend {backend} on {device}, {dtype}, head dim {head_dim}"
    if not error <= LIMITS[dtype]:
        raise SelfCheckFailed(
            f"{case}: relative error {error:.3g} against dense attention; at most {LIMITS[dtype]}; {_report(device)}"
        )
    if min(pairs) == 0:
        used = dict(zip(config.levels, pairs, strict=True))
        raise SelfCheckFailed(
            f"{case}: each level should serve some pairs, but the pairs per level are {used}; {_report(device)}"
        )


def _report(device: torch.device) -> str:
    """What the project needs to know about this machine."""
    triton = getattr(sys.modules.get("triton"), "__version__", "not loaded")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, Triton {triton}, {gpu}, {platform.system()}"
    return f"please report this line as a bug of PSA Attention ({versions})"


def _inputs(
    layout: TokenLayout, order: TokenOrder, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)  # its own: a sampler's noise must not move
    q, k, v = torch.randn(3, 1, 2, layout.tokens, head_dim, generator=generator)
    keys = order.keys
    sizes = (1, 2, 4, 8, keys.size)
    tokens = keys.tokens.cpu().long()
    for block in range(keys.video_blocks):
        size = sizes[block % len(sizes)]
        places = tokens[block * keys.size : (block + 1) * keys.size]
        first = places.view(-1, size)[:, :1].expand(-1, size).flatten()
        filled = places >= 0
        for x in (k, v):
            x[:, :, places[filled]] = x[:, :, first[filled]]
    q, k, v = (x.to(device=device, dtype=dtype) for x in (q, k, v))
    return q, k, v


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return weights @ v
