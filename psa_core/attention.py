"""psa_attention(): the pipeline, from q, k, v in their own order to the output in the same order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends
from .capability import HEAD_DIMS, NEEDS
from .config import PSAConfig
from .layout import TokenLayout
from .ordering import TokenOrder, order_tokens

DTYPES = NEEDS["reference"].dtypes  # what the definition takes; a backend may take less


@dataclass(frozen=True)
class PSAStats:
    """What one call did. The tensors stay on the device; reading them is what synchronises.

    Args:
        density: Share of the dense query-key work that was done, exact pairs included ``[B, H]``, fp32.
        level_pairs: Number of (video query block, video key block) pairs at each level of the config
            ``[B, H, levels]``, int64.
    """

    density: Tensor
    level_pairs: Tensor


def plan_order(layout: TokenLayout, config: PSAConfig, device: torch.device | str) -> TokenOrder:
    """Compute the index tables of a layout once, to be passed to many calls as ``order``."""
    return order_tokens(layout, config, torch.device(device))


def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TokenLayout,
    config: PSAConfig,
    scale: float | None = None,
    backend: str = "auto",
    order: TokenOrder | None = None,
    stats: bool = False,
) -> Tensor | tuple[Tensor, PSAStats]:
    """Self-attention over video tokens on a pyramid of keys and values.

    Args:
        q: Queries ``[B, H, N, D]``, any strides; D is 64 or 128; bf16, fp16 or fp32 (fp64 on the reference).
        k: Keys, same shape and dtype.
        v: Values, same shape and dtype.
        layout: Where the video is among the N tokens.
        config: Selection, levels, order and block sizes.
        scale: Softmax scale; ``D ** -0.5`` when not given.
        backend: ``auto``, ``triton`` or ``reference``. ``auto`` takes Triton on CUDA, and the reference elsewhere and
            where the inputs need gradients, which only it gives (what backward needs comes on top of
            ``workspace_mib``); an explicit request never falls back.
        order: ``plan_order(layout, config, q.device)``, where the caller keeps it between calls.
        stats: Also return a :class:`PSAStats`.

    Returns:
        The attention output ``[B, H, N, D]`` with q's dtype and memory layout, and the statistics if asked for.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
        backends.BackendUnavailable: the requested backend cannot run here, with the reason.
        torch.OutOfMemoryError: there is not even memory for the output or for one head at a time.
    """
    _check_inputs(q, k, v, layout, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if order is None:
        order = plan_order(layout, config, q.device)
    elif not order.fits(layout, config, q.device):
        raise ValueError("order: was planned for another layout, config or device")
    engine = backends.resolve(backend, q, k, v)

    out = torch.empty_like(q)
    collected = _attend_in_chunks(engine, q, k, v, out, order, config, scale, stats)
    if not stats:
        return out
    shape = q.shape[:2]
    density = torch.cat([part.density.flatten(0, 1) for part in collected]).view(shape)
    level_pairs = torch.cat([part.level_pairs.flatten(0, 1) for part in collected]).view(*shape, -1)
    return out, PSAStats(density, level_pairs)


def _attend_in_chunks(
    engine: backends.Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    order: TokenOrder,
    config: PSAConfig,
    scale: float,
    stats: bool,
) -> list[PSAStats]:
    """All heads, as many at a time as the workspace holds; half as many from where memory runs out."""
    size = heads_per_chunk(q.shape[1], engine.workspace_bytes_per_head(q, order, config), config)
    collected: list[PSAStats] = []
    for batch in range(q.shape[0]):
        first = 0
        while first < q.shape[1]:
            part = (slice(batch, batch + 1), slice(first, first + size))
            try:
                counted = _attend_chunk(engine, q[part], k[part], v[part], out[part], order, config, scale, stats)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                counted = None
            if counted is None:  # outside of the clause, whose error keeps the chunk's tensors alive
                size = math.ceil(size / 2)
                continue
            collected.extend(counted)
            first += size
    return collected


def _attend_chunk(
    engine: backends.Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    order: TokenOrder,
    config: PSAConfig,
    scale: float,
    stats: bool,
) -> list[PSAStats]:
    """One chunk of heads, whose temporary memory is free again on return."""
    prepared = engine.prepare(q, k, v, order, config, scale)
    selection = engine.select(prepared, engine.importance(prepared))
    engine.attend(prepared, selection, out)
    return [PSAStats(*engine.count(prepared, selection))] if stats else []


def heads_per_chunk(heads: int, bytes_per_head: int, config: PSAConfig) -> int:
    """Heads that go through the pipeline at a time: chunks about alike, as few as the workspace allows.

    Args:
        heads: Heads of one batch item.
        bytes_per_head: What the backend's ``workspace_bytes_per_head`` says.
        config: ``workspace_mib`` is used.

    Raises:
        ValueError: not even one head fits.
    """
    limit = config.workspace_mib * 2**20
    if bytes_per_head > limit:
        least = math.ceil(bytes_per_head / 2**20)
        raise ValueError(f"workspace_mib: {config.workspace_mib} is too small for one head; the least is {least}")
    chunks = math.ceil(heads / (limit // bytes_per_head))
    return math.ceil(heads / chunks)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, scale: float | None) -> None:
    if q.dim() != 4:
        raise ValueError(f"q: shape {tuple(q.shape)} is not [B, H, N, D]")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)} differs from q's {tuple(q.shape)}; only self-attention"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device} differs from q's {q.dtype} on {q.device}")
    if q.shape[0] < 1 or q.shape[1] < 1:
        raise ValueError(f"q: shape {tuple(q.shape)} has no batch item or no head")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"q: head dim {q.shape[-1]} is not one of {HEAD_DIMS}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: dtype {q.dtype} is not one of {', '.join(map(str, DTYPES))}")
    if q.shape[2] != layout.tokens:
        raise ValueError(f"layout: {layout.tokens} tokens, but q has {q.shape[2]}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: {scale!r} is not a positive number")
