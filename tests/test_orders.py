"""Orders are bijections, blocks hold one kind of token, and curves stay together."""

from __future__ import annotations

import builtins
import io
import os
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from psa_pack.psa_core import PSAConfig, TokenLayout, plan_order
from psa_pack.psa_core.curves import gilbert_curve, raster_curve, tile_curve

from conftest import cases

pytestmark = pytest.mark.usefixtures("all_cases_tried")

grids = st.tuples(st.integers(1, 9), st.integers(1, 14), st.integers(1, 14))


@given(grid=grids, tile=st.tuples(*[st.integers(1, 6)] * 3))
@settings(max_examples=cases(200))
def test_every_curve_visits_every_token_once(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    everything = np.arange(np.prod(grid))
    for curve in (gilbert_curve(grid), tile_curve(grid, tile), raster_curve(grid)):
        np.testing.assert_array_equal(np.sort(curve), everything)


@given(grid=grids)
@settings(max_examples=cases(200))
def test_gilbert_curve_never_jumps_further_than_two(grid: tuple[int, int, int]) -> None:
    places = np.stack(np.unravel_index(gilbert_curve(grid), grid), axis=1)
    jumps = np.abs(np.diff(places, axis=0)).sum(1)
    assert jumps.max(initial=0) <= 2  # 1 but at the seam of some odd boxes


def test_gilbert_blocks_are_compact() -> None:
    """A block of 64 neighbours along the curve reaches less far than one of 64 neighbours in a row."""

    def mean_extent(curve: np.ndarray) -> float:
        places = np.stack(np.unravel_index(curve, (8, 16, 32)), axis=1).reshape(-1, 64, 3)
        return float((places.max(1) - places.min(1)).sum(1).mean())

    assert mean_extent(gilbert_curve((8, 16, 32))) < 0.5 * mean_extent(raster_curve((8, 16, 32)))


def test_tiles_follow_one_another() -> None:
    places = np.stack(np.unravel_index(tile_curve((5, 6, 7), (4, 4, 4)), (5, 6, 7)), axis=1)
    first = places[:64]
    np.testing.assert_array_equal(first.max(0), [3, 3, 3])
    np.testing.assert_array_equal(places[64:112].min(0), [0, 0, 4])  # next along the width, cut off at the edge
    np.testing.assert_array_equal(places[64:112].max(0), [3, 3, 6])


@pytest.mark.timeout(60)
def test_planning_the_largest_usual_video_is_quick() -> None:
    plan_order(TokenLayout((2, 3, 4)), PSAConfig(error_weight=0.01), "cpu")  # imports
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        gilbert_curve((21, 45, 80))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2


def test_planning_uses_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_order(TokenLayout((2, 3, 4)), PSAConfig(error_weight=0.01), "cpu")  # imports

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a file was opened: {args}")

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (torch, "save"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    plan_order(TokenLayout((5, 6, 7)), PSAConfig(error_weight=0.01), "cpu")


@given(
    grid=grids,
    before=st.integers(0, 70),
    after=st.integers(0, 70),
    more=st.lists(st.tuples(st.integers(0, 40), grids), max_size=2),
    span=st.tuples(st.integers(0, 200), st.integers(1, 90)),
    key_block=st.sampled_from([32, 64, 128]),
    order=st.sampled_from(["gilbert", "tile", "raster"]),
)
@settings(max_examples=cases(200))
def test_blocks_hold_every_token_once_and_never_both_kinds(
    grid: tuple[int, int, int],
    before: int,
    after: int,
    more: list[tuple[int, tuple[int, int, int]]],
    span: tuple[int, int],
    key_block: int,
    order: str,
) -> None:
    videos, end = [(before, grid)], before + int(np.prod(grid))
    for gap, further in more:
        videos.append((end + gap, further))
        end += gap + int(np.prod(further))
    tokens = end + after
    start = min(span[0], tokens - 1)
    layout = TokenLayout(grid, before, tokens, ((start, min(start + span[1], tokens)),), tuple(videos[1:]))
    assert layout.videos == tuple(videos)
    planned = plan_order(layout, PSAConfig(error_weight=0.01, key_block=key_block, order=order), "cpu")
    video = np.zeros(tokens, dtype=bool)
    for first, shape in videos:
        video[first : first + int(np.prod(shape))] = True
    video[layout.exact_spans[0][0] : layout.exact_spans[0][1]] = False
    for table in (planned.queries, planned.keys):
        places = table.tokens.numpy().reshape(table.blocks, table.size)
        filled = places >= 0
        np.testing.assert_array_equal(np.sort(places[filled]), np.arange(tokens))
        np.testing.assert_array_equal(filled.sum(1), table.counts.numpy())
        assert (filled.sum(1) >= 1).all()
        for block in range(table.blocks):
            assert set(video[places[block][filled[block]]]) == {block < table.video_blocks}
            assert filled[block][: filled[block].sum()].all()  # empty places come last
        full = np.ones(table.blocks, dtype=bool)
        full[[table.video_blocks - 1, table.blocks - 1]] = False
        assert (filled.sum(1)[full] == table.size).all()


def test_each_video_follows_its_own_curve() -> None:
    layout = TokenLayout((2, 6, 5), 7, 200, (), ((80, (3, 4, 4)),))
    planned = plan_order(layout, PSAConfig(error_weight=0.01), "cpu").keys
    tokens = planned.tokens[: planned.video_blocks * planned.size].numpy()
    expected = [gilbert_curve((2, 6, 5)) + 7, gilbert_curve((3, 4, 4)) + 80]
    np.testing.assert_array_equal(tokens[tokens >= 0], np.concatenate(expected))


def test_an_order_of_another_layout_is_refused() -> None:
    from psa_pack.psa_core import psa_attention

    config = PSAConfig(error_weight=0.01)
    q = torch.randn(1, 1, 60, 64)
    with pytest.raises(ValueError, match="order: was planned for another layout"):
        psa_attention(
            q,
            q,
            q,
            layout=TokenLayout((3, 4, 5)),
            config=config,
            order=plan_order(TokenLayout((5, 4, 3)), config, "cpu"),
        )
