"""How much memory a call takes, and what happens where there is not so much."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import pytest
import torch
from psa_pack.psa_core import PSAConfig, TokenLayout, psa_attention
from psa_pack.psa_core.backends import reference
from psa_pack.psa_core.presets import load_presets
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from conftest import ROOT
from oracle import CAPPED, MIXED, THRESHOLD, plan, random_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

WAN_720P = TokenLayout((21, 45, 80))


def peak_bytes(run: Callable[[], object]) -> int:
    """What PyTorch's CPU allocator had given out at most, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "nothing was counted"
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        MIXED,
        dataclasses.replace(MIXED, importance_stride=1, query_block=64, key_block=32),
        dataclasses.replace(CAPPED, importance_stride=1, similarity_caps=((2, 0.0), (4, 0.0), (8, 0.0))),
        PSAConfig(error_weight=0.0, levels=(1,), key_block=128),
    ],
    ids=["usual", "every row and small blocks", "capped", "dense"],
)
def test_the_reference_takes_what_it_says(
    config: PSAConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads and their parts: no more than it says, and not many times less."""
    monkeypatch.setattr(reference, "PART", 2**14)
    layout, heads = TokenLayout((3, 16, 20), video_start=40), 2
    q, k, v = (x.to(dtype) for x in random_inputs(layout, 128, heads=heads))
    order = plan(layout, config)
    taken = peak_bytes(lambda: psa_attention(q, k, v, layout=layout, config=config, order=order, stats=True))
    said = heads * reference.workspace_bytes_per_head(q, order, config)
    assert 0.3 * said < taken - q.nbytes < said


@pytest.mark.parametrize("config", [dataclasses.replace(MIXED, importance_stride=1), THRESHOLD], ids=["error", "rank"])
def test_a_720p_video_fits_into_the_default_workspace(config: PSAConfig) -> None:
    """All keys of one head, and some of its query blocks: the others take the same memory once more."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, WAN_720P.tokens, 128, generator=generator).bfloat16()
    order = plan(WAN_720P, config)
    assert reference.workspace_bytes_per_head(q, order, config) <= config.workspace_mib * 2**20
    table, blocks = order.queries, 6
    some = dataclasses.replace(
        table, video_blocks=blocks, tokens=table.tokens[: blocks * table.size], counts=table.counts[:blocks]
    )
    few = dataclasses.replace(order, queries=some)
    out = torch.full_like(q, float("nan"))

    def call() -> None:
        prepared = reference.prepare(q, k, v, few, config, 128**-0.5)
        codes = reference.select(prepared, reference.importance(prepared))
        codes[:, :, 1] = 0  # all at full resolution
        reference.attend(prepared, codes, out)
        reference.count(prepared, codes)

    assert peak_bytes(call) <= reference.workspace_bytes_per_head(q, few, config)
    assert out.isfinite().all(-1).sum() == blocks * table.size


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_runs_at_720p_on_the_reference(path: object) -> None:
    for name, preset in load_presets(path).items():
        order = plan(WAN_720P, preset.config)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            q = torch.empty(1, 1, WAN_720P.tokens, 128, dtype=dtype, device="meta")
            needed = reference.workspace_bytes_per_head(q, order, preset.config)
            assert needed <= preset.config.workspace_mib * 2**20, (name, dtype, needed / 2**20)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_where_memory_runs_out_fewer_heads_go_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From there on, so that it runs out only once or twice in a call; no bit changes."""
    layout, config = TokenLayout((2, 5, 7), video_start=3), PSAConfig(error_weight=0.3)
    q, k, v = random_inputs(layout, 64, batch=2, heads=5)
    expected, expected_stats = psa_attention(q, k, v, layout=layout, config=config, stats=True)
    attend, sizes, kept = reference.attend, [], []

    def attend_few(prepared: reference.Prepared, codes: Tensor, out: Tensor) -> None:
        assert not any(alive() is not None for alive in kept), "the failed chunk is still in memory"
        sizes.append(out.shape[1])
        if out.shape[1] > most:
            kept.append(weakref.ref(prepared.query_squares))
            raise torch.OutOfMemoryError("no memory for so many heads")
        attend(prepared, codes, out)

    monkeypatch.setattr(reference, "attend", attend_few)
    out, stats = psa_attention(q, k, v, layout=layout, config=config, stats=True)
    assert torch.equal(out, expected)
    assert torch.equal(stats.density, expected_stats.density)
    assert torch.equal(stats.level_pairs, expected_stats.level_pairs)
    tries = {1: [5, 3, 2, *[1] * 10], 2: [5, 3, *[2, 2, 1] * 2], 3: [5, *[3, 2] * 2]}
    assert sizes == tries[most]


def test_memory_that_a_single_head_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout((2, 5, 7))
    q, k, v = random_inputs(layout, 64, heads=2)

    def attend(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory at all")

    monkeypatch.setattr(reference, "attend", attend)
    with pytest.raises(torch.OutOfMemoryError, match="no memory at all"):
        psa_attention(q, k, v, layout=layout, config=PSAConfig(error_weight=0.3))
