"""What kernels and reference are measured against: a plain loop, dense attention, and inputs worth the trouble."""

from __future__ import annotations

import dataclasses
import math

import torch
from psa_pack.psa_core import PSAConfig, TokenLayout, TokenOrder, plan_order
from psa_pack.psa_core.backends import reference
from psa_pack.psa_core.ordering import BlockTable
from torch import Tensor

MIXED = PSAConfig(error_weight=0.3)
"""A weight at which random inputs use every level."""

TOPK = PSAConfig(
    selection="topk", levels=(1, 2, 4, 8, "skip"), ranges=((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
)
THRESHOLD = PSAConfig(
    selection="threshold",
    levels=(1, 2, 4, 8, "skip"),
    ranges=((0, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.0)),
)

GROUPED = dataclasses.replace(MIXED, group_keys=True)

CAPPED = dataclasses.replace(THRESHOLD, similarity_caps=((2, 0.35), (4, 0.4), (8, 0.45)))
"""Similarities at which random inputs reach every limit."""


def random_inputs(
    layout: TokenLayout, head_dim: int, *, batch: int = 1, heads: int = 2, seed: int = 0, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 q, k, v ``[B, H, N, D]`` that share a part, so that some keys matter more than others.

    Neighbours in the sequence resemble each other, so that pooling is neither free nor hopeless.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = normal(batch, heads, layout.tokens // 40 + 1, head_dim).repeat_interleave(40, dim=2)[:, :, : layout.tokens]
    q, k, v = (spread * (shared + 0.6 * normal(batch, heads, layout.tokens, head_dim)) for _ in range(3))
    return q, k, v


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention in fp64 ``[B, H, N, D]``."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * q @ k.transpose(-1, -2), dim=-1) @ v


def attend_row_by_row(
    q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, codes: Tensor, scale: float
) -> Tensor:
    """The definition, one query row and one group of keys at a time, given the level of every pair of blocks.

    Args:
        codes: Level codes ``[B, H, query blocks, key blocks]``.
    """
    out = torch.full_like(q, math.nan)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = k[b, h] - k[b, h].mean(0)
            tokens_k = key_places(keys, order.keys, config)
            for i, rows in enumerate(_places(order.queries)):
                rows = [token for token in rows if token >= 0]
                squares = q[b, h, rows].square().mean(0)
                means, logs, values = [], [], []
                for j, places in enumerate(tokens_k):
                    code = int(codes[b, h, i, j])
                    if code == 255:
                        continue
                    groups = _groups(places, 1 << code)
                    pooled = code > 0 and config.variance_term
                    bias = _second_order_term(keys, groups, squares, scale) if pooled else 0.0
                    for group in groups:
                        means.append(keys[group].mean(0))
                        logs.append(math.log(len(group)) + bias)
                        values.append(v[b, h, group].mean(0))
                for row in rows:
                    logits = [scale * float(q[b, h, row] @ mean) + log for mean, log in zip(means, logs, strict=True)]
                    weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0)
                    out[b, h, row] = weights @ torch.stack(values)
    return out


def key_places(keys: Tensor, table: BlockTable, config: PSAConfig) -> list[list[int]]:
    """Tokens at the places of every key block of one head ``[N, D]``: in order of content where the config says so."""
    blocks = _places(table)
    if not config.group_keys:
        return blocks
    return [
        _split(keys, places) if j < table.video_blocks and min(places) >= 0 else places
        for j, places in enumerate(blocks)
    ]


def _split(keys: Tensor, tokens: list[int]) -> list[int]:
    if len(tokens) == 2:
        return tokens
    centred = keys[tokens] - keys[tokens].mean(0)
    direction = centred[0]
    for _ in range(2):
        direction = sum(key * float(key @ direction) for key in centred)
        direction = direction / float(direction.norm()) if direction.any() else direction
    along = [float(key @ direction) for key in centred]
    order = [tokens[i] for i in sorted(range(len(tokens)), key=along.__getitem__)]
    return _split(keys, order[: len(tokens) // 2]) + _split(keys, order[len(tokens) // 2 :])


def _groups(places: list[int], size: int) -> list[list[int]]:
    groups = [places[start : start + size] for start in range(0, len(places), size)]
    groups = [[token for token in group if token >= 0] for group in groups]
    return [group for group in groups if group]


def _second_order_term(keys: Tensor, groups: list[list[int]], squares: Tensor, scale: float) -> float:
    return min(_logit_variance(keys, groups, squares, scale) / 2, 1.0)


def _logit_variance(keys: Tensor, groups: list[list[int]], squares: Tensor, scale: float) -> float:
    tokens = sum(map(len, groups))
    variance = sum((keys[group] - keys[group].mean(0)).square().sum(0) for group in groups) / tokens
    return float(scale * scale * (squares @ variance))


def importance_row_by_row(q: Tensor, k: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> Tensor:
    """The definition of one head's importance ``[query blocks, key blocks]``, a query row at a time."""
    keys = k[0, 0] - k[0, 0].mean(0)
    size = config.importance_group or order.keys.size
    clamp = 3.0 if size == order.keys.size else 1.5
    groups = [
        (j, group) for j, places in enumerate(key_places(keys, order.keys, config)) for group in _groups(places, size)
    ]
    importance = torch.zeros(order.queries.blocks, order.keys.blocks, dtype=torch.float64)
    for i, rows in enumerate(_places(order.queries)):
        rows = [token for token in rows if token >= 0]
        squares = q[0, 0, rows].square().mean(0)
        seen = rows[:: config.importance_stride]
        for row in seen:
            logits = [
                scale * float(q[0, 0, row] @ keys[group].mean(0))
                + math.log(len(group))
                + min(_logit_variance(keys, [group], squares, scale) / 2, clamp)
                for _, group in groups
            ]
            masses = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0) / len(seen)
            importance[i].index_add_(0, torch.tensor([j for j, _ in groups]), masses)
    return importance


def choose_pair_by_pair(
    q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, importance: Tensor, scale: float
) -> list[list[set[int]]]:
    """The definition of one head's levels ``[query blocks][key blocks]``, as codes; several where rounding decides."""
    keys, values = k[0, 0] - k[0, 0].mean(0), v[0, 0]
    video_rows, video_keys = order.queries.video_blocks, order.keys.video_blocks
    chosen = [[{0} for _ in range(order.keys.blocks)] for _ in range(order.queries.blocks)]
    for i, rows in enumerate(_places(order.queries)[:video_rows]):
        squares = q[0, 0, [token for token in rows if token >= 0]].square().mean(0)
        if config.selection != "error":
            for j, codes in enumerate(_rank(importance[i, :video_keys].tolist(), config)):
                chosen[i][j] = codes
            continue
        for j, places in enumerate(key_places(keys, order.keys, config)[:video_keys]):
            tokens, scores = sum(token >= 0 for token in places), {}
            for size in config.group_sizes:
                groups = _groups(places, size)
                spread = sum(float((values[group] - values[group].mean(0)).square().sum()) for group in groups) / tokens
                error = float(importance[i, j]) ** 2 * _logit_variance(keys, groups, squares, scale) * spread
                error /= float(values.square().sum(1).mean())
                cost = -(-tokens // size) / tokens
                scores[size.bit_length() - 1] = (0 if size == 1 else error) + config.error_weight / video_keys * cost
            least = min(scores.values())
            chosen[i][j] = {code for code, score in scores.items() if score <= least * (1 + 1e-9)}
    return chosen


def _rank(masses: list[float], config: PSAConfig) -> list[set[int]]:
    codes: list[set[int]] = [set() for _ in masses]
    before = 0.0
    for rank, block in enumerate(sorted(range(len(masses)), key=lambda j: -masses[j])):
        place = rank / len(masses) if config.selection == "topk" else before / sum(masses)
        for code, (low, high) in zip(config.level_codes, config.ranges, strict=True):
            last = high == 1  # the mass before a block may round to 1
            if low - 1e-12 <= place < high + 1e-12 or (last and place >= 1):
                codes[block].add(code)
        before += masses[block]
    return codes


def _places(table: BlockTable) -> list[list[int]]:
    return table.tokens.view(-1, table.size).tolist()


def reference_codes(q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> Tensor:
    """Levels that the reference selects ``[B, H, query blocks, key blocks]``."""
    prepared = reference.prepare(q.double(), k.double(), v.double(), order, config, scale)
    return reference.select(prepared, reference.importance(prepared))


def reference_output(
    q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float, codes: Tensor
) -> Tensor:
    """fp64 output of the reference at given levels."""
    out = torch.empty_like(q, dtype=torch.float64)
    reference.attend(reference.prepare(q.double(), k.double(), v.double(), order, config, scale), codes, out)
    return out


def rounding_error(
    q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float, codes: Tensor
) -> float:
    """What working in q's dtype costs the reference: its error when its keys, values and output are rounded to it."""
    exact = reference_output(q, k, v, order, config, scale, codes)
    prepared = reference.prepare(q.double(), k.double(), v.double(), order, config, scale)
    rounded = dataclasses.replace(
        prepared,
        pyramid=tuple(
            dataclasses.replace(level, keys=level.keys.to(q.dtype).double(), values=level.values.to(q.dtype).double())
            for level in prepared.pyramid
        ),
    )
    out = torch.empty_like(q, dtype=q.dtype)
    reference.attend(rounded, codes, out)
    return relative_error(out, exact)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error; NaN if anything is not finite."""
    return float((actual.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


def assert_as_exact_as(actual: Tensor, exact: Tensor, unavoidable: float) -> None:
    """The one tolerance of all kernel tests: twice what rounding to the dtype costs, and fp32's own rounding."""
    error = relative_error(actual, exact)
    limit = 2 * unavoidable + 2e-6
    assert error <= limit, f"relative error {error:.3g}, at most {limit:.3g}"


def plan(layout: TokenLayout, config: PSAConfig, device: str = "cpu") -> TokenOrder:
    """Index tables of a layout."""
    return plan_order(layout, config, device)
