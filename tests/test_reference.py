"""The reference against a loop over single rows and groups, and its selection against the definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product

import pytest
import torch
from psa_pack.psa_core import PSAConfig, TokenLayout, psa_attention
from psa_pack.psa_core.backends import reference
from psa_pack.psa_core.levels import cap_levels, select_by_error, select_by_rank, similarity_limits
from torch import Tensor

from oracle import (
    CAPPED,
    GROUPED,
    MIXED,
    THRESHOLD,
    TOPK,
    attend_row_by_row,
    dense_attention,
    plan,
    random_inputs,
    reference_codes,
    relative_error,
)

LAYOUTS = {
    "ragged tail": TokenLayout((3, 7, 10)),
    "text first": TokenLayout((2, 8, 9), video_start=21),
    "text last, and an exact span in the video": TokenLayout((2, 8, 9), 0, 160, ((3, 40),)),
    "fewer tokens than a block": TokenLayout((1, 4, 5)),
    "one block": TokenLayout((1, 8, 8)),
    "a prime": TokenLayout((1, 1, 131)),
    "two videos between texts, and a third": TokenLayout((2, 5, 6), 9, 250, (), ((69, (1, 7, 9)), (140, (3, 5, 5)))),
}
SMALL_BLOCKS = {"query_block": 64, "key_block": 32}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "config", [MIXED, GROUPED, TOPK, THRESHOLD, CAPPED], ids=["error", "grouped", "topk", "threshold", "capped"]
)
def test_attention_is_the_loops(layout: TokenLayout, config: PSAConfig) -> None:
    config = dataclasses.replace(config, **SMALL_BLOCKS)
    q, k, v = random_inputs(layout, 64, batch=2, heads=1)
    order, scale = plan(layout, config), 0.11
    codes = reference_codes(q, k, v, order, config, scale)
    expected = attend_row_by_row(q, k, v, order, config, codes, scale)
    actual = psa_attention(q, k, v, layout=layout, config=config, scale=scale, backend="reference")
    assert relative_error(actual, expected) < 1e-12


def test_the_cases_above_use_every_level() -> None:
    layout = TokenLayout((6, 16, 16))
    for config in (MIXED, TOPK, THRESHOLD, CAPPED):
        q, k, v = random_inputs(layout, 64)
        _, stats = psa_attention(q, k, v, layout=layout, config=config, backend="reference", stats=True)
        assert stats.level_pairs.sum(dim=(0, 1)).min() > 0, config.selection


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weight_zero_is_dense(layout: TokenLayout, grouped: bool) -> None:
    q, k, v = random_inputs(layout, 128)
    config = PSAConfig(error_weight=0.0, group_keys=grouped)
    actual, stats = psa_attention(q, k, v, layout=layout, config=config, backend="reference", stats=True)
    assert relative_error(actual, dense_attention(q, k, v)) < 1e-12
    torch.testing.assert_close(stats.density, torch.ones_like(stats.density))


def test_density_counts_rows_times_groups() -> None:
    layout = TokenLayout((2, 8, 9), video_start=21)
    q, k, v = random_inputs(layout, 64)
    order = plan(layout, MIXED)
    codes = reference_codes(q, k, v, order, MIXED, 64**-0.5)
    work = 0
    for i, rows in enumerate(order.queries.counts.tolist()):
        for j, tokens in enumerate(order.keys.counts.tolist()):
            work += rows * -(-tokens // (1 << int(codes[0, 0, i, j])))
    _, stats = psa_attention(q, k, v, layout=layout, config=MIXED, backend="reference", stats=True)
    assert stats.density[0, 0].item() == pytest.approx(work / layout.tokens**2, rel=1e-6)


@pytest.mark.parametrize("selection", [MIXED, TOPK, THRESHOLD], ids=lambda config: config.selection)
def test_more_weight_or_exactness_never_costs_what_it_should_not(selection: PSAConfig) -> None:
    """Text queries are dense, and text keys exact for everyone, whatever the selection."""
    layout = TokenLayout((4, 12, 12), video_start=30)
    q, k, v = random_inputs(layout, 64)
    out = psa_attention(q, k, v, layout=layout, config=selection, backend="reference")
    assert relative_error(out[:, :, :30], dense_attention(q, k, v)[:, :, :30]) < 1e-12
    codes = reference_codes(q, k, v, plan(layout, selection), selection, 64**-0.5)
    assert (codes[..., -1] == 0).all()
    assert (codes[:, :, -1] == 0).all()


def test_density_falls_and_error_grows_with_the_weight() -> None:
    layout = TokenLayout((4, 16, 16))
    q, k, v = random_inputs(layout, 64, heads=3)
    exact = dense_attention(q, k, v)
    densities, errors = [], []
    for weight in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0):
        out, stats = psa_attention(
            q, k, v, layout=layout, config=PSAConfig(error_weight=weight), backend="reference", stats=True
        )
        densities.append(stats.density.double().mean().item())
        errors.append(relative_error(out, exact))
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == 1.0
    assert densities[-1] < 0.1
    assert errors == sorted(errors)


def test_groups_of_equal_tokens_pool_without_loss() -> None:
    """Where averaging loses nothing, the coarsest level is taken and the result is dense attention's."""
    layout = TokenLayout((1, 1, 640))
    config = PSAConfig(error_weight=1e-6, order="raster")
    q, k, v = random_inputs(layout, 64)
    k, v = (x[:, :, ::64].repeat_interleave(64, dim=2) for x in (k, v))
    out, stats = psa_attention(q, k, v, layout=layout, config=config, backend="reference", stats=True)
    assert stats.level_pairs[0, 0].tolist() == [0, 0, 0, 0, 50]
    assert relative_error(out, dense_attention(q, k, v)) < 1e-12


def test_ties_go_to_the_finer_level() -> None:
    """A predicted error that saves exactly its cost is not worth making."""
    counts = torch.tensor([64])
    config = PSAConfig(error_weight=1.0, levels=(1, 2))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for error, code in ((0.5, 0), (0.49, 1), (float("nan"), 0), (float("inf"), 0)):
        chosen = select_by_error(
            one, torch.stack([one, error * one]), torch.ones(2, 1, 1, 1), torch.ones(1, 1), counts, config
        )
        assert chosen.item() == code, error


def test_topk_counts_are_exact_under_ties() -> None:
    importance = torch.full((1, 2, 3, 20), 0.05, dtype=torch.float64)
    codes = select_by_rank(importance, TOPK)
    for code in (0, 1, 2, 3, 255):
        assert ((codes == code).sum(-1) == 4).all()
    assert codes[0, 0, 0].tolist() == sorted(codes[0, 0, 0].tolist())  # equal masses rank in block order


def test_threshold_looks_at_the_mass_before_a_block() -> None:
    """A block that holds 75 % of the mass is exact: nothing ranks before it."""
    importance = torch.tensor([[[[0.02, 0.75, 0.2, 0.03]]]], dtype=torch.float64)
    config = dataclasses.replace(THRESHOLD, levels=(1, 2, "skip"), ranges=((0.0, 0.7), (0.7, 0.96), (0.96, 1.0)))
    assert select_by_rank(importance, config).tolist() == [[[[255, 0, 1, 1]]]]


def limit_of(keys: Tensor, caps: tuple[tuple[int, float], ...]) -> int:
    """The definition: coarsest level code of a block of keys ``[n, D]`` whose groups' ends resemble each other."""
    limit = 0
    for level, least in caps:
        groups = [keys[start : start + level] for start in range(0, len(keys), level)]
        cosines = [float(group[0] @ group[-1] / (group[0].norm() * group[-1].norm())) for group in groups]
        if sum(cosines) / len(cosines) > least:
            limit = level.bit_length() - 1
    return limit


@pytest.mark.parametrize("layout", [TokenLayout((6, 16, 16), 9), TokenLayout((3, 7, 10))], ids=["text first", "ragged"])
def test_no_block_is_pooled_further_than_its_keys_resemble_each_other(layout: TokenLayout) -> None:
    q, k, v = random_inputs(layout, 64, batch=2)
    order = plan(layout, CAPPED)
    prepared = reference.prepare(q, k, v, order, CAPPED, 0.125)
    rows, blocks = order.queries.video_blocks, order.keys.video_blocks
    uncapped = select_by_rank(reference.importance(prepared)[:, :, :rows, :blocks], CAPPED)
    capped = reference_codes(q, k, v, order, CAPPED, 0.125)[:, :, :rows, :blocks]
    places = order.keys.tokens.view(-1, CAPPED.key_block)[:blocks].tolist()
    assert CAPPED.similarity_caps is not None
    for b, h, j in product(range(2), range(2), range(blocks)):
        limit = limit_of(k[b, h, [token for token in places[j] if token >= 0]], CAPPED.similarity_caps)
        expected = [code if code == 255 else min(code, limit) for code in uncapped[b, h, :, j].tolist()]
        assert capped[b, h, :, j].tolist() == expected


def test_caps_need_no_video_block() -> None:
    """A sequence all of whose tokens stay exact has no block to cap."""
    layout = TokenLayout((1, 2, 3), exact_spans=((0, 6),))
    q, k, v = random_inputs(layout, 64)
    out = psa_attention(q, k, v, layout=layout, config=CAPPED, backend="reference")
    assert relative_error(out, dense_attention(q, k, v)) < 1e-12


def test_finite_where_only_the_unscaled_logits_overflow() -> None:
    layout = TokenLayout((1, 4, 5))
    q, k, v = (torch.ones(1, 1, 20, 64) for _ in range(3))
    k[:, :, 3] = 1e37
    out = psa_attention(q, k, v, layout=layout, config=PSAConfig(error_weight=0.0), backend="reference")
    assert torch.isfinite(out).all()


def test_every_limit_is_its_own() -> None:
    """A coarse level may be allowed where a finer one is not, as in the official code; skip is no pooling."""
    config = dataclasses.replace(CAPPED, key_block=32, similarity_caps=((2, 0.9), (4, 0.9), (8, 0.9)))
    k = torch.eye(8, 64).repeat(4, 1)
    k[7::8] = k[::8]  # first and last of eight are equal, all others differ
    codes = torch.tensor([[[[0], [1], [2], [3], [255]]]], dtype=torch.uint8)
    places = torch.arange(32, dtype=torch.int32)[None]
    assert cap_levels(codes, similarity_limits(k[None, None], places, config)).flatten().tolist() == [0, 1, 2, 3, 255]
    apart = torch.eye(32, 64)[None, None]
    assert cap_levels(codes, similarity_limits(apart, places, config)).flatten().tolist() == [0, 0, 0, 0, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(value: float) -> None:
    layout = TokenLayout((2, 10, 11))
    q, k, v = random_inputs(layout, 64, heads=3)
    k[0, 1, 17, 5] = value
    out = psa_attention(q, k, v, layout=layout, config=MIXED, backend="reference")
    assert torch.isfinite(out[0, [0, 2]]).all()


def test_the_output_keeps_the_inputs_memory_layout() -> None:
    layout = TokenLayout((2, 10, 11))
    packed = torch.randn(2, layout.tokens, 3 * 64)
    q = packed.view(2, layout.tokens, 3, 64).transpose(1, 2)
    out = psa_attention(q, q, q, layout=layout, config=MIXED, backend="reference")
    assert out.stride() == q.stride()
    assert out.transpose(1, 2).reshape(2, layout.tokens, -1).data_ptr() == out.data_ptr()


def test_no_global_random_generator_moves() -> None:
    layout = TokenLayout((2, 10, 11))
    q, k, v = random_inputs(layout, 64)
    before = torch.get_rng_state()
    first = psa_attention(q, k, v, layout=layout, config=MIXED, backend="reference")
    second = psa_attention(q, k, v, layout=layout, config=MIXED, backend="reference")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)


@pytest.mark.parametrize("config", [MIXED, CAPPED], ids=["error", "capped"])
def test_parts_change_nothing(config: PSAConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of a step is too much at a time, it is done in parts."""
    layout = TokenLayout((3, 9, 11), video_start=21)
    q, k, v = random_inputs(layout, 64, batch=2)
    whole, stats = psa_attention(q, k, v, layout=layout, config=config, backend="reference", stats=True)
    monkeypatch.setattr(reference, "PART", 1)
    out, counted = psa_attention(q, k, v, layout=layout, config=config, backend="reference", stats=True)
    assert relative_error(out, whole) < 1e-14
    assert torch.equal(counted.level_pairs, stats.level_pairs) and torch.equal(counted.density, stats.density)


def gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a weighted sum of the output, with respect to each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), leaves)


def test_the_gradient_at_weight_zero_is_dense_attentions() -> None:
    layout, config = TokenLayout((2, 8, 9), video_start=21), PSAConfig(error_weight=0.0)
    inputs = random_inputs(layout, 64, batch=2)
    expected = gradients(dense_attention, inputs)
    actual = gradients(lambda q, k, v: psa_attention(q, k, v, layout=layout, config=config), inputs)
    assert max(map(relative_error, actual, expected)) < 1e-12


def test_the_gradient_is_the_outputs_slope() -> None:
    """At the levels taken, which a small step does not change: pooled keys and second-order terms have theirs."""
    layout = TokenLayout((3, 9, 11))
    inputs = random_inputs(layout, 64, heads=1)
    config = dataclasses.replace(TOPK, levels=(1, 2, 4, 8, "block"))  # ranks change less easily than errors
    step = [1e-6 * x for x in random_inputs(layout, 64, heads=1, seed=1)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return psa_attention(q, k, v, layout=layout, config=config)

    def loss(inputs: tuple[Tensor, ...]) -> Tensor:
        out = attend(*inputs)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

    ahead, behind = (tuple(x + sign * d for x, d in zip(inputs, step, strict=True)) for sign in (1, -1))
    slope = sum((g * d).sum() for g, d in zip(gradients(attend, inputs), step, strict=True))
    assert float(loss(ahead) - loss(behind)) / 2 == pytest.approx(float(slope), rel=1e-5)
