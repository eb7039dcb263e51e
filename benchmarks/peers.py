"""Other kernels for the same attention, each called as its own documentation says.

A peer gives one :class:`Run` for every setting that is worth a record. What a peer cannot do here it says by raising;
the benchmark records the reason and goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.results_file import checked_out_commit, installed
from psa_core import PSAConfig, TokenLayout, TokenOrder, plan_order
from psa_core.backends import resolve
from psa_core.levels import select_by_rank

SOL_TAUS = (0.5, 1.0, 2.0)  # Sol-Attn's routing threshold: larger is cheaper
FLEX_KEY_BLOCKS = (64, 128)  # ours, and FlexAttention's own default

# The PSA authors' top-k preset of CogVideoX-5B, with the key block size at which their kernel is fastest and right.
OFFICIAL_LEVELS = {1: (0.0, 0.1), 2: (0.1, 0.15), 4: (0.15, 0.15), 8: (0.15, 0.35), 0: (0.35, 1.0)}
OFFICIAL_BLOCKS = {"block_m": 128, "block_n": 128, "tile_n": 32}


class Unavailable(RuntimeError):
    """A peer is not installed or does not take the case; the message says which."""


@dataclass(frozen=True)
class Run:
    """One setting of a peer, ready to be timed.

    Args:
        preset: Its name in the records.
        attend: Gives the output ``[1, H, N, D]``.
        density: Share of the dense work, where the peer tells.
        stages: Gives the parts of ``attend``, by name, ready to be timed by themselves.
        about: Further entries of the record, such as the peer's version.
    """

    preset: str
    attend: Callable[[], Tensor]
    density: float | None = None
    stages: Callable[[], dict[str, Callable[[], Any]]] = dict
    about: dict[str, Any] = field(default_factory=dict)


def exact_blocks_config(layout: TokenLayout, density: float, key_block: int) -> PSAConfig:
    """The most important key blocks exact and nothing of the others, at a density over all tokens."""
    tokens, video = layout.tokens, layout.video_tokens
    share = (density * tokens**2 - (tokens**2 - video**2)) / video**2  # pairs with a text token are all attended
    return PSAConfig(
        selection="topk",
        levels=(1, "skip"),
        ranges=((0.0, share), (share, 1.0)),
        variance_term=False,
        key_block=key_block,
    )


def exact_blocks_name(key_block: int) -> str:
    """Name of that setting in the records, the same for FlexAttention and for PSA."""
    return f"top-k, key blocks of {key_block}"


def flex(layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, density: float) -> Iterator[Run]:
    """FlexAttention on the very key blocks that PSA attends when its levels are exact and skip.

    The block mask is given: what it takes to find it is not in the time. Putting tokens into block order and the
    output back is.
    """
    for key_block in FLEX_KEY_BLOCKS:
        torch.compiler.reset()  # another shape would otherwise be compiled for all shapes, and be slower
        attend = torch.compile(flex_attention, dynamic=False)
        call = FlexCall.of(layout, q, k, v, exact_blocks_config(layout, density, key_block))
        options = {"BLOCK_M": 128, "BLOCK_N": 64} if key_block == 64 else None  # its own default tile may be wider

        def compute(call: FlexCall = call, attend: Any = attend, options: Any = options) -> Tensor:
            return call.restore(call.attend(attend, *call.arrange(q, k, v), options))

        def stages(call: FlexCall = call, attend: Any = attend, options: Any = options) -> dict[str, Callable[[], Any]]:
            arranged = call.arrange(q, k, v)
            return {
                "order": partial(call.arrange, q, k, v),
                "attend": partial(call.attend, attend, *arranged, options),
                "restore": partial(call.restore, call.attend(attend, *arranged, options)),
            }

        yield Run(exact_blocks_name(key_block), compute, call.density, stages)


@dataclass(frozen=True)
class FlexCall:
    """A block mask, and how tokens come into its order and back.

    Args:
        mask: Key blocks of every query block of every head.
        query_places: Token at every place of the query blocks, 0 where there is none ``[places]``, int64.
        key_places: The same of the key blocks.
        back: Place of every token among the query blocks ``[N]``, int64.
        density: Share of the dense work.
    """

    mask: BlockMask
    query_places: Tensor
    key_places: Tensor
    back: Tensor
    density: float

    @staticmethod
    def of(layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, config: PSAConfig) -> FlexCall:
        """Find the blocks that the config keeps at level 1."""
        order = plan_order(layout, config, q.device)
        kept = kept_blocks(order, q, k, v, config)
        rows, keys = order.queries, order.keys
        work = (kept * keys.counts).sum(-1) * rows.counts
        return FlexCall(
            mask=_block_mask(kept, order),
            query_places=rows.tokens.clamp(min=0).long(),
            key_places=keys.tokens.clamp(min=0).long(),
            back=torch.argsort(torch.where(rows.tokens < 0, layout.tokens, rows.tokens), stable=True)[: layout.tokens],
            density=float(work.sum() / (q.shape[1] * layout.tokens**2)),
        )

    def arrange(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[1, H, N, D]`` in blocks ``[1, H, places, D]``."""
        places = (self.query_places, self.key_places, self.key_places)
        ordered = [x.index_select(2, place) for x, place in zip((q, k, v), places, strict=True)]
        return ordered[0], ordered[1], ordered[2]

    def attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, int] | None = None) -> Tensor:
        """Attention in blocks ``[1, H, places, D]``, by flex_attention, compiled or not."""
        with torch.no_grad():
            out: Tensor = attention(q, k, v, block_mask=self.mask, kernel_options=options)
        return out

    def restore(self, out: Tensor) -> Tensor:
        """The output in the tokens' own order ``[1, H, N, D]``."""
        return out.index_select(2, self.back)


def kept_blocks(order: TokenOrder, q: Tensor, k: Tensor, v: Tensor, config: PSAConfig) -> Tensor:
    """Which key blocks PSA attends exactly ``[H, query blocks, key blocks]``, bool; the same for any backend."""
    engine = resolve("auto", q)
    rows, keys = order.queries.video_blocks, order.keys.video_blocks
    kept = torch.ones(q.shape[1], order.queries.blocks, order.keys.blocks, dtype=torch.bool, device=q.device)
    for head in range(q.shape[1]):
        part = (slice(None), slice(head, head + 1))
        prepared = engine.prepare(q[part], k[part], v[part], order, config, q.shape[-1] ** -0.5)
        codes = select_by_rank(engine.importance(prepared)[:, :, :rows, :keys], config)
        kept[head, :rows, :keys] = codes[0, 0] == 0
    return kept


def _block_mask(kept: Tensor, order: TokenOrder) -> BlockMask:
    """FlexAttention's form of it: ragged blocks are partial and masked by token, all others are full."""
    filled = order.keys.tokens >= 0
    ragged = order.keys.counts < order.keys.size

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None], indices.to(torch.int32)[None]

    partial_count, partial_indices = listed(kept & ragged)
    full_count, full_indices = listed(kept & ~ragged)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_indices,
        full_count,
        full_indices,
        BLOCK_SIZE=(order.queries.size, order.keys.size),
        mask_mod=lambda b, h, row, key: filled[key],
    )


def sage(layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, density: float) -> Iterator[Run]:
    """SageAttention, dense, in the layout in which ComfyUI calls it."""
    module = find("sageattention")
    k = k.clone()  # version 1 centres the caller's keys in place
    transposed = [x.transpose(1, 2) for x in (q, k, v)]
    yield Run(
        "",
        lambda: module.sageattn(*transposed, tensor_layout="NHD", is_causal=False).transpose(1, 2),
        1.0,
        about={"version": installed("sageattention")},
    )


def int8_attention(layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, density: float) -> Iterator[Run]:
    """comfy-kitchen's dense int8 attention."""
    module = find("comfy_kitchen")
    yield Run("", lambda: module.int8_attention(q, k, v), 1.0, about={"version": installed("comfy_kitchen")})


def sol_attn(layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, density: float) -> Iterator[Run]:
    """comfy-kitchen's Sol-Attn at several thresholds."""
    module = find("comfy_kitchen")
    if q.shape[-1] != 128:
        raise Unavailable(f"takes head dim 128 only, not {q.shape[-1]}")
    transposed = [x.transpose(1, 2) for x in (q, k, v)]
    about = {"version": installed("comfy_kitchen")}
    for tau in SOL_TAUS:

        def attend(tau: float = tau) -> Tensor:
            out: Tensor = module.sol_attn(*transposed, tau=tau)
            return out.transpose(1, 2)

        yield Run(f"tau {tau:g}", attend, about=about)


def official(
    layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, density: float, *, checkout: Path | None = None
) -> Iterator[Run]:
    """The PSA authors' code at their top-k preset, density .149 by their own count, in Gilbert order."""
    if checkout is None:
        raise Unavailable("needs --official PATH, a checkout of ziplab/Pyramid-Sparse-Attention")
    module = _import_official(checkout)
    frames, height, width = layout.grid
    config = module.AttentionConfig(
        **OFFICIAL_BLOCKS,
        width=width,
        height=height,
        depth=frames,
        text_length=layout.video_start,
        mask_ratios=OFFICIAL_LEVELS,
        mask_mode="topk",
        attn_impl="new_mask_type",
        use_sim_mask=False,
        use_rearrange=True,
        rearrange_method="Gilbert",
        warmup_steps=0,
        enable_logging=False,
        verbose=True,  # count the density, this once: it synchronises
    )
    attention = module.PyramidSparseAttention(config, inference_num=1, layer_num=1)
    torch.manual_seed(0)  # its importance draws from the global generator
    attention(q, k, v, 0)
    config.verbose = False

    def attend() -> Tensor:
        out: Tensor = attention(q, k, v, 0)
        return out

    about = {"version": checked_out_commit(checkout)} if (checkout / ".git").exists() else {}
    yield Run("top-k 1 2 8 skip", attend, 1 - float(attention.sparsity_acc), about=about)


PEERS: dict[str, Callable[..., Iterator[Run]]] = {
    "flex": flex,
    "sage": sage,
    "int8_attention": int8_attention,
    "sol_attn": sol_attn,
    "official": official,
}


def find(name: str) -> Any:
    """The module of a peer."""
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"{name} is not installed")
    return importlib.import_module(name)


def _import_official(checkout: Path) -> Any:
    if not (checkout / "src" / "psa_triton" / "__init__.py").is_file():
        raise Unavailable(f"{checkout} has no src/psa_triton")
    if "psa_triton" not in sys.modules:
        sys.path.insert(0, str(checkout / "src"))
    with contextlib.redirect_stdout(sys.stderr):  # it prints on import
        return importlib.import_module("psa_triton")
