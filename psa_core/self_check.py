"""Whether a backend computes what it should on this machine, asked once before it is trusted with a video."""

from __future__ import annotations

import math
import platform
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from .attention import plan_order, psa_attention
from .backends import resolve
from .config import PSAConfig
from .layout import TokenLayout
from .ordering import BlockTable

GRID = (5, 16, 17)  # 1360 tokens: several full key blocks for each level, and a ragged one
TEXT_TOKENS = 40
SEED = 20251204
LIMITS = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-6}

ERROR_WEIGHT = 1e-5  # so little that only what loses nothing is pooled
LEAST_SIMILARITY = 0.5  # groups of equal keys are above it, others far below
FALL = 1.7  # logarithm of how much more attention the first block gets than the last
SPREAD = 0.5  # of the keys, by which they differ otherwise
TILTED = 0  # the dimension of queries and keys that ranks the blocks; all others hold noise
QUERY_TILT = 8.0


class SelfCheckFailed(RuntimeError):
    """A backend's result is not that of dense attention where it must be."""


def self_check(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str, config: PSAConfig) -> None:
    """Compare a backend with dense attention on a small seeded input, at every level of the config at once.

    Whether a block is pooled, and how far, must not matter to the right result. So the key blocks take turns: each is
    meant for one of the config's levels, and its keys and values are equal within that level's groups, which averaging
    then loses nothing of; what is meant to be skipped has no weight to speak of. A slope over the blocks, the same for
    all queries, ranks them as meant where levels go by rank. Where similarity caps them, some blocks are equal only in
    smaller groups than they are meant for.

    What specialises no kernel (error weights, ranges, caps, orders, memory) makes no difference to the check: it has
    values of its own, and one check serves all configs that agree in the rest.

    Args:
        device: Where to compute.
        dtype: Of queries, keys and values.
        head_dim: 64 or 128.
        backend: ``triton`` or ``reference``.
        config: The settings that the backend is to be trusted with.

    Raises:
        SelfCheckFailed: with what was expected, what came out, and what to report.
    """
    check_once(device, dtype, head_dim, backend, representative(config))


def representative(config: PSAConfig) -> PSAConfig:
    """The config by which all are checked that launch the same kernels: what specialises none is the check's own."""
    common = replace(config, order="gilbert", tile=None, workspace_mib=PSAConfig.workspace_mib)
    if config.selection == "error":
        return replace(common, error_weight=ERROR_WEIGHT)
    count = len(config.levels)
    return replace(
        common,
        ranges=tuple((index / count, (index + 1) / count) for index in range(count)),
        similarity_caps=config.similarity_caps
        and tuple((level, LEAST_SIMILARITY) for level, _ in config.similarity_caps),
    )


@cache
def check_once(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str, config: PSAConfig) -> None:
    """The check of a representative config; what has passed is not checked again in this process."""
    layout = TokenLayout(GRID, video_start=TEXT_TOKENS)
    order = plan_order(layout, config, device)
    roles = _cast(order.keys, config, dtype)
    if config.selection != "error":
        config = replace(config, ranges=_ranges(roles, config))
    q, k, v = (x.to(device, dtype) for x in _inputs(layout, order.keys, roles, head_dim))
    resolve(backend, q).warm_up(q, k, v, order, config, head_dim**-0.5)
    out, stats = psa_attention(q, k, v, layout=layout, config=config, backend=backend, order=order, stats=True)
    error = _relative_error(out, q, k, v)
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


@dataclass(frozen=True)
class _Role:
    """What one key block is there for.

    Args:
        level: Place of its level among the config's.
        tokens: Its tokens.
        group: Tokens of the groups in which its keys and values are equal.
        tilt: Logit of its mean key.
    """

    level: int
    tokens: int
    group: int
    tilt: float

    def mass(self, size: int) -> float:
        """About the attention that it gets, in a unit of its own: its keys differ within a block of this size."""
        return self.tokens * math.exp(self.tilt + SPREAD**2 / 2 * (1 - self.group / size))


def _cast(keys: BlockTable, config: PSAConfig, dtype: torch.dtype) -> list[_Role]:
    """The roles of all video key blocks, which take turns through the levels."""
    levels, counts = config.levels, keys.counts[: keys.video_blocks].tolist()
    negligible = math.log(torch.finfo(dtype).eps / 10)
    ranking = sorted(range(len(counts)), key=lambda block: (block % len(levels), block))
    roles = []
    for block, tokens in enumerate(counts):
        place = block % len(levels)
        sizes = [1, *(size for size in config.group_sizes[: place + 1] if size > 1)]
        is_skipped = levels[place] == "skip"
        is_capped = config.similarity_caps is not None and block // len(levels) % 2 == 1
        roles.append(
            _Role(
                level=place,
                tokens=tokens,
                group=1 if is_skipped else sizes[max(len(sizes) - 1 - is_capped, 0)],
                tilt=math.log(keys.size / tokens) + negligible * is_skipped - FALL * ranking.index(block) / len(counts),
            )
        )
    return roles


def _ranges(roles: list[_Role], config: PSAConfig) -> tuple[tuple[float, float], ...]:
    """Ranges by which each block gets the level that it is meant for: they end half a block before the next level's."""
    shares = [1.0 if config.selection == "topk" else role.mass(config.key_block) for role in roles]
    edges, before = [0.0], 0.0
    for place in range(len(config.levels)):
        own = [(role.tilt, share) for role, share in zip(roles, shares, strict=True) if role.level == place]
        before += sum(share for _, share in own)
        edges.append((before - min(own)[1] / 2) / sum(shares))
    return tuple(pairwise([*edges[:-1], 1.0]))


def _inputs(layout: TokenLayout, keys: BlockTable, roles: list[_Role], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[1, 2, N, D]``, fp32."""
    generator = torch.Generator().manual_seed(SEED)  # its own: a sampler's noise must not move
    q, k, v = torch.randn(3, 1, 2, layout.tokens, head_dim, generator=generator)
    q[..., TILTED] = QUERY_TILT
    k *= SPREAD
    k[..., TILTED] = 0
    tokens = keys.tokens.cpu().long().view(-1, keys.size)
    for role, places in zip(roles, tokens[: keys.video_blocks], strict=True):
        first = places.view(-1, role.group)[:, :1].expand(-1, role.group).flatten()
        filled = places >= 0
        for x in (k, v):
            x[:, :, places[filled]] = x[:, :, first[filled]]
        own = k[:, :, places[filled]]
        own -= own.mean(dim=2, keepdim=True)  # only the tilt is left of its mean, so that all queries rank it alike
        own[..., TILTED] = role.tilt / (QUERY_TILT * head_dim**-0.5)
        k[:, :, places[filled]] = own
    return q, k, v


def _relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Against dense attention in fp64: no setting of the user's makes it less than exact."""
    heads = [tuple(x[0, head].double() for x in (q, k, v)) for head in range(q.shape[1])]
    exact = torch.stack([torch.softmax(q @ k.T * q.shape[-1] ** -0.5, dim=-1) @ v for q, k, v in heads])
    return float((out[0].double() - exact).norm() / exact.norm())


def _report(device: torch.device) -> str:
    """What the project needs to know about this machine."""
    triton = getattr(sys.modules.get("triton"), "__version__", "not loaded")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, Triton {triton}, {gpu}, {platform.system()}"
    return f"please report this line as a bug of PSA Attention ({versions})"
