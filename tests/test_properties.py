"""What holds for every grid, text, dtype and selection: random cases, the same in every run but that of `make fuzz`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from psa_pack.psa_core import PSAConfig, TokenLayout, psa_attention
from psa_pack.psa_core.backends import reference
from psa_pack.psa_core.capability import reason_against
from torch import Tensor

from conftest import cases
from oracle import (
    assert_as_exact_as,
    attend_row_by_row,
    choose_pair_by_pair,
    importance_row_by_row,
    plan,
    random_inputs,
    reference_codes,
    reference_output,
    relative_error,
    rounding_error,
)

pytestmark = pytest.mark.usefixtures("all_cases_tried")

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
SEEDS = st.integers(0, 2**16)
HEAD_DIMS = st.sampled_from([64, 128])


@st.composite
def layouts(draw: st.DrawFn, most: int = 150) -> TokenLayout:
    """A video of at most ``most`` tokens, with text on either side and exact tokens inside."""
    t = draw(st.integers(1, 4))
    h = draw(st.integers(1, 9))
    w = draw(st.integers(1, max(min(most // (t * h), 16), 1)))
    before, after = draw(st.integers(0, 40)), draw(st.sampled_from([0, 0, 1, 33]))
    tokens = before + t * h * w + after
    start = draw(st.integers(0, tokens - 1))
    spans = draw(st.sampled_from([(), (), ((start, min(start + 20, tokens)),)]))
    return TokenLayout((t, h, w), before, tokens, spans)


@st.composite
def configs(draw: st.DrawFn, selections: tuple[str, ...] = ("error", "topk", "threshold")) -> PSAConfig:
    """Any legal config."""
    selection = draw(st.sampled_from(selections))
    order = draw(st.sampled_from(["gilbert", "tile", "raster"]))
    common: dict[str, Any] = {
        "selection": selection,
        "order": order,
        "tile": draw(st.tuples(*[st.integers(1, 5)] * 3)) if order == "tile" else None,
        "query_block": draw(st.sampled_from([64, 128])),
        "key_block": draw(st.sampled_from([32, 64, 128])),
        "importance_stride": draw(st.sampled_from([1, 2, 4, 8, 16])),
        "importance_group": draw(st.sampled_from([None, 8, 16, 32])),
        "variance_term": draw(st.booleans()),
    }
    coarse = draw(st.lists(st.sampled_from([2, 4, 8, "block"]), unique=True))
    coarse.sort(key=[2, 4, 8, "block"].index)
    if selection == "error":
        weight = draw(st.sampled_from([0.0, 1e-4, 0.01, 0.1, 0.3, 1.0, 1e6]))
        return PSAConfig(levels=(1, *coarse), error_weight=weight, group_keys=draw(st.booleans()), **common)
    first = draw(st.sampled_from([(), (1,)])) or (() if coarse else (1,))
    levels = (*first, *coarse, *draw(st.sampled_from([(), ("skip",)])))
    inner = draw(st.lists(st.integers(1, 99), min_size=len(levels) - 1, max_size=len(levels) - 1, unique=True))
    edges = [0.0, *(edge / 100 for edge in sorted(inner)), 1.0]
    caps = None
    if levels[0] == 1 and "block" not in levels and draw(st.booleans()):
        caps = tuple((level, draw(st.floats(-1, 1))) for level in levels if level in (2, 4, 8))
    ranges = tuple(itertools.pairwise(edges))
    grouped = not caps and draw(st.booleans())
    return PSAConfig(levels=levels, ranges=ranges, similarity_caps=caps or None, group_keys=grouped, **common)


@given(
    layout=layouts(),
    config=configs(),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    head_dim=HEAD_DIMS,
    dtype=DTYPES,
    scale=st.sampled_from([None, 0.02, 0.4]),
    seed=SEEDS,
)
@settings(max_examples=cases(400))
def test_attention_is_the_loops(
    layout: TokenLayout,
    config: PSAConfig,
    batch: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    scale: float | None,
    seed: int,
) -> None:
    q, k, v = (x.to(dtype) for x in random_inputs(layout, head_dim, batch=batch, heads=heads, seed=seed))
    order, used_scale = plan(layout, config), scale or head_dim**-0.5
    codes = reference_codes(q, k, v, order, config, used_scale)
    exact = attend_row_by_row(q.double(), k.double(), v.double(), order, config, codes, used_scale)
    out = psa_attention(q, k, v, layout=layout, config=config, scale=scale, backend="reference")
    assert (out.dtype, out.shape) == (dtype, q.shape)
    if dtype == torch.float64:
        assert relative_error(out, exact) < 1e-12
    else:
        assert_as_exact_as(out, exact, relative_error(exact.to(dtype), exact))


@given(layout=layouts(), config=configs(), scale=st.sampled_from([0.02, 0.125, 0.4]), seed=SEEDS)
@settings(max_examples=cases(400))
def test_importance_and_levels_are_the_definitions(
    layout: TokenLayout, config: PSAConfig, scale: float, seed: int
) -> None:
    config = dataclasses.replace(config, similarity_caps=None)  # test_reference.py has their definition
    q, k, v = random_inputs(layout, 64, heads=1, seed=seed)
    order = plan(layout, config)
    prepared = reference.prepare(q, k, v, order, config, scale)
    importance = reference.importance(prepared)
    expected = importance_row_by_row(q, k, order, config, scale)
    torch.testing.assert_close(importance[0, 0], expected, rtol=1e-9, atol=1e-14)
    codes = reference.select(prepared, importance)[0, 0].tolist()
    allowed = choose_pair_by_pair(q, k, v, order, config, importance[0, 0], scale)
    for i, row in enumerate(allowed):
        for j, levels in enumerate(row):
            assert codes[i][j] in levels, f"pair ({i}, {j})"


@given(layout=layouts(400), config=configs(("error",)), head_dim=HEAD_DIMS, dtype=DTYPES, seed=SEEDS)
@settings(max_examples=cases(200))
def test_density_never_rises_with_the_weight(
    layout: TokenLayout, config: PSAConfig, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    q, k, v = (x.to(dtype) for x in random_inputs(layout, head_dim, heads=1, seed=seed))
    order, densities = plan(layout, config), []
    for weight in (0.0, 1e-3, 0.03, 0.1, 0.4, 2.0, 1e6):
        weighted = dataclasses.replace(config, error_weight=weight)
        prepared = reference.prepare(q, k, v, order, weighted, head_dim**-0.5)
        codes = reference.select(prepared, reference.importance(prepared))
        densities.append(float(reference.count(prepared, codes)[0]))
    assert densities[0] == pytest.approx(1)
    assert densities == sorted(densities, reverse=True)


MAGNITUDES = {
    torch.float16: (1e-7, 1e-3, 1.0, 100.0, 6e3),
    torch.bfloat16: (1e-38, 1e-18, 1e-3, 1.0, 1e4, 1e15, 1e36),
    torch.float32: (1e-38, 1e-18, 1e-3, 1.0, 1e4, 1e15, 1e36),
}


def hard_inputs(layout: TokenLayout, kind: str, dtype: torch.dtype, sizes: list[int], seed: int) -> tuple[Tensor, ...]:
    """q, k, v ``[1, 2, N, 64]`` of a kind that breaks careless softmaxes, each at one of the dtype's magnitudes."""
    q, k, v = random_inputs(layout, 64, seed=seed)
    if kind == "constant keys":
        k = k[:, :, :1].expand_as(k)
    elif kind == "equal logits":
        q = torch.zeros_like(q)
    elif kind == "one-hot values":
        v = torch.nn.functional.one_hot(torch.arange(layout.tokens) % 64, 64).to(v).expand_as(v)
    elif kind == "constant values":
        v = torch.ones_like(v)
    elif kind == "zero values":
        v = torch.zeros_like(v)
    elif kind == "duplicated tokens":
        q, k, v = (x[:, :, torch.arange(layout.tokens) // 7 * 7] for x in (q, k, v))
    elif kind == "one far key":
        k[:, :, layout.tokens // 2] *= 9
    known = MAGNITUDES[dtype]
    return tuple((x * known[size % len(known)]).to(dtype) for x, size in zip((q, k, v), sizes, strict=True))


KINDS = [
    "random",
    "constant keys",
    "equal logits",
    "one-hot values",
    "constant values",
    "zero values",
    "duplicated tokens",
    "one far key",
]


def dense_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.float(), k.float(), v.float()
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v


HARD = {
    "layout": layouts(),
    "config": configs(),
    "kind": st.sampled_from(KINDS),
    "dtype": st.sampled_from(list(MAGNITUDES)),
    "sizes": st.lists(st.integers(0, 6), min_size=3, max_size=3),
    "seed": SEEDS,
}


@given(**HARD)
@settings(max_examples=cases(700))
def test_finite_wherever_dense_attention_is(
    layout: TokenLayout, config: PSAConfig, kind: str, dtype: torch.dtype, sizes: list[int], seed: int
) -> None:
    q, k, v = hard_inputs(layout, kind, dtype, sizes, seed)
    finite = torch.isfinite(dense_fp32(q, k, v).to(dtype)).all(-1)
    out = psa_attention(q, k, v, layout=layout, config=config, backend="reference")
    assert torch.isfinite(out).all(-1)[finite].all()


@given(
    layout=layouts(),
    config=configs(),
    dtype=DTYPES,
    poisons=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 200), st.sampled_from([math.nan, math.inf, -math.inf])),
        min_size=1,
        max_size=4,
    ),
    seed=SEEDS,
)
@settings(max_examples=cases(200))
def test_what_is_not_finite_stays_in_its_head(
    layout: TokenLayout, config: PSAConfig, dtype: torch.dtype, poisons: list[tuple[int, int, float]], seed: int
) -> None:
    """The other heads and the other batch item keep every bit."""
    clean = tuple(x.to(dtype) for x in random_inputs(layout, 64, batch=2, heads=2, seed=seed))
    poisoned = tuple(x.clone() for x in clean)
    for which, token, value in poisons:
        poisoned[which][1, 0, token % layout.tokens, token % 64] = value
    before, after = (psa_attention(*x, layout=layout, config=config, backend="reference") for x in (clean, poisoned))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, 1], after[1, 1])


interpreted = pytest.mark.skipif(
    (reason := reason_against("triton", torch.device("cpu"), torch.float32, 64)) is not None, reason=str(reason)
)


@pytest.mark.interpreter
@interpreted
@given(
    layout=layouts(100),
    config=configs(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    head_dim=HEAD_DIMS,
    seed=SEEDS,
)
@settings(max_examples=cases(80))
def test_kernels_are_the_reference(
    layout: TokenLayout, config: PSAConfig, dtype: torch.dtype, head_dim: int, seed: int
) -> None:
    """Given the same levels, in Triton's interpreter."""
    from psa_pack.psa_core.backends import triton

    q, k, v = (x.to(dtype) for x in random_inputs(layout, head_dim, heads=1, seed=seed))
    order, scale = plan(layout, config), head_dim**-0.5
    codes = reference_codes(q, k, v, order, config, scale)
    exact = reference_output(q, k, v, order, config, scale, codes)
    prepared = triton.prepare(q, k, v, order, config, scale)
    video = codes[:, :, : order.queries.video_blocks, : order.keys.video_blocks].contiguous()
    out = torch.full_like(q, math.nan)
    triton.attend(prepared, triton.select_given(prepared, video), out)
    assert_as_exact_as(out, exact, rounding_error(q, k, v, order, config, scale, codes))


@pytest.mark.interpreter
@interpreted
@given(**{**HARD, "layout": layouts(100), "dtype": st.sampled_from([torch.float16, torch.float32])})
@settings(max_examples=cases(60))
def test_kernels_are_finite_wherever_dense_attention_is(
    layout: TokenLayout, config: PSAConfig, kind: str, dtype: torch.dtype, sizes: list[int], seed: int
) -> None:
    q, k, v = hard_inputs(layout, kind, dtype, sizes, seed)
    finite = torch.isfinite(dense_fp32(q, k, v).to(dtype)).all(-1)
    out = psa_attention(q, k, v, layout=layout, config=config, backend="triton")
    assert torch.isfinite(out).all(-1)[finite].all()
