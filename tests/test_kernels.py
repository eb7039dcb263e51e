"""Triton kernels against the reference: on a CUDA device, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from psa_pack.psa_core import PSAConfig, TokenLayout, psa_attention
from psa_pack.psa_core.backends import reference
from psa_pack.psa_core.capability import reason_against
from psa_pack.psa_core.self_check import check_once, representative
from torch import Tensor

from oracle import (
    CAPPED,
    GROUPED,
    MIXED,
    THRESHOLD,
    TOPK,
    assert_as_exact_as,
    dense_attention,
    plan,
    random_inputs,
    reference_codes,
    reference_output,
    relative_error,
    rounding_error,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter multiplies the bits of bf16 numbers as if they were integers.
HALF = [torch.float16] + ([torch.bfloat16] if ON_GPU else [])
DTYPES = [*HALF, torch.float32]

pytestmark = [
    pytest.mark.gpu if ON_GPU else pytest.mark.interpreter,
    pytest.mark.skipif(
        (reason := reason_against("triton", torch.device(DEVICE), torch.float32, 64)) is not None, reason=str(reason)
    ),
]

BATCH = 2 if ON_GPU else 1  # the interpreter takes seconds a head; one test below has several of both

SMALL = {"query_block": 64, "key_block": 32}
CASES: dict[str, tuple[TokenLayout, PSAConfig, int]] = {
    # every row says what it is there for
    "all levels, ragged tail": (TokenLayout((3, 9, 11)), MIXED, 64),
    "the other head dim, and blocks that just fill": (TokenLayout((4, 8, 8)), MIXED, 128),
    "text first, exact query blocks": (TokenLayout((3, 7, 10), video_start=21), MIXED, 64),
    "text last and an exact span": (TokenLayout((3, 7, 10), 0, 260, ((3, 40),)), MIXED, 64),
    "everything exact but nothing": (TokenLayout((2, 5, 7), 0, 80, ((0, 70),)), MIXED, 64),
    "several videos between texts": (
        TokenLayout((2, 7, 8), 9, 330, (), ((121, (1, 9, 7)), (200, (3, 5, 7)))),
        MIXED,
        64,
    ),
    "fewer tokens than a block": (TokenLayout((1, 4, 5)), MIXED, 64),
    "a prime number of tokens": (TokenLayout((1, 1, 331)), MIXED, 64),
    "key blocks smaller than a tile": (TokenLayout((3, 9, 11)), dataclasses.replace(MIXED, **SMALL), 64),
    "key blocks larger than a tile": (TokenLayout((3, 9, 15)), dataclasses.replace(MIXED, key_block=128), 64),
    "every row in the importance": (TokenLayout((3, 9, 11)), dataclasses.replace(MIXED, importance_stride=1), 64),
    "without the second-order term": (TokenLayout((3, 9, 11)), dataclasses.replace(MIXED, variance_term=False), 64),
    "few levels, tiles": (TokenLayout((3, 9, 11)), PSAConfig(error_weight=0.2, levels=(1, 4), order="tile"), 64),
    "topk with skip": (TokenLayout((3, 9, 15)), TOPK, 64),
    "topk, small blocks": (TokenLayout((3, 9, 11)), dataclasses.replace(TOPK, **SMALL), 64),
    "threshold with skip, text": (TokenLayout((3, 9, 11), video_start=5), THRESHOLD, 64),
    "importance from parts of blocks": (
        TokenLayout((3, 9, 11), video_start=21),
        dataclasses.replace(GROUPED, importance_group=16, importance_stride=8),
        64,
    ),
    "the same with blocks of another size": (
        TokenLayout((3, 9, 15)),
        dataclasses.replace(MIXED, key_block=128, importance_group=32, importance_stride=16),
        128,
    ),
    "keys in order of content": (TokenLayout((3, 9, 11), video_start=5), GROUPED, 64),
    "the same in small blocks": (TokenLayout((3, 9, 11)), dataclasses.replace(GROUPED, **SMALL), 128),
    "the same in large blocks": (TokenLayout((3, 9, 15)), dataclasses.replace(GROUPED, key_block=128), 64),
    "capped by similarity": (TokenLayout((3, 9, 11), video_start=5), CAPPED, 64),
}


def triton_backend():
    from psa_pack.psa_core.backends import triton

    return triton


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kernel has written is NaN or a huge integer, so that whoever reads it shows."""
    package = triton_backend().__name__
    empty = import_module(f"{package}.storage").empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        memory: Tensor = empty(*args, **kwargs)
        huge = math.nan if memory.is_floating_point() else min(torch.iinfo(memory.dtype).max, 2**24)
        return memory.fill_(huge)  # as an index, not so huge that a multiple of it wraps around to a small one

    holders = [module for name, module in sys.modules.items() if name.startswith(package) and hasattr(module, "empty")]
    assert len(holders) >= 4, "storage and the three steps that take memory from it"
    for module in holders:
        monkeypatch.setattr(module, "empty", poisoned)


def low_precision(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Inputs in the dtype on the device, in the memory layout in which ComfyUI passes them."""
    return tuple(x.to(DEVICE, dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "config", "head_dim"), CASES.values(), ids=CASES)
def test_each_step_is_the_references(layout: TokenLayout, config: PSAConfig, head_dim: int, dtype: torch.dtype) -> None:
    triton, scale = triton_backend(), head_dim**-0.5
    q, k, v = low_precision(random_inputs(layout, head_dim, batch=BATCH, heads=BATCH), dtype)
    order, host_order = plan(layout, config, DEVICE), plan(layout, config)
    host = tuple(x.cpu() for x in (q, k, v))
    codes = reference_codes(*host, host_order, config, scale)
    exact = reference_output(*host, host_order, config, scale, codes)
    unavoidable = rounding_error(*host, host_order, config, scale, codes)
    video = codes[:, :, : order.queries.video_blocks, : order.keys.video_blocks]

    host_prepared = reference.prepare(*(x.double() for x in host), host_order, config, scale)
    # Which of two keys lies further along a direction is a matter of rounding: the order is the reference's.
    prepared = triton.prepare_given(q, k, v, order, config, scale, reference_places(host_prepared).to(DEVICE))
    importance = triton.importance(prepared)
    expected = reference.importance(host_prepared)
    assert relative_error(importance, expected) < 2e-3
    torch.testing.assert_close(importance.sum(-1).cpu(), torch.ones(importance.shape[:-1]), rtol=1e-4, atol=1e-4)

    given = triton.select_given(prepared, video.to(DEVICE))
    out = torch.full_like(q, float("nan"))
    triton.attend(prepared, given, out)
    assert_as_exact_as(out, exact, unavoidable)

    counted = [x.cpu() for x in triton.count(prepared, given)]
    density, pairs = reference.count(host_prepared, codes)
    torch.testing.assert_close(counted[0], density)
    assert torch.equal(counted[1], pairs)

    own_density, own_pairs = triton.count(prepared, triton.select(prepared, importance))
    # near ties may fall either way, no more than a pair in fifty
    assert (own_pairs.cpu() - pairs).abs().sum() <= 2 + pairs.sum() // 25
    torch.testing.assert_close(own_density.cpu(), density, rtol=0.03, atol=0.003)


def reference_places(prepared: reference.Prepared) -> Tensor:
    """Token at every key place, for each head where the reference has sorted them."""
    keys = prepared.order.keys
    if prepared.key_order is None:
        return keys.tokens
    tokens = keys.tokens.view(keys.blocks, keys.size).expand(prepared.key_order.shape)
    return tokens.gather(3, prepared.key_order.long()).flatten(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("key_block", [32, 64, 128])
def test_keys_are_in_the_references_order(key_block: int, head_dim: int, dtype: torch.dtype) -> None:
    layout, config = TokenLayout((3, 9, 15), video_start=5), dataclasses.replace(GROUPED, key_block=key_block)
    q, k, v = low_precision(random_inputs(layout, head_dim), dtype)
    order, host_order = plan(layout, config, DEVICE), plan(layout, config)
    host = tuple(x.cpu().double() for x in (q, k, v))
    expected = reference_places(reference.prepare(*host, host_order, config, 0.1)).view(2, -1, key_block)
    actual = triton_backend().sort_by_content(k, order.keys).cpu().view(2, -1, key_block)
    assert torch.equal(actual.sort(-1).values, expected.sort(-1).values)  # whatever the order, it is one
    exact = slice(host_order.keys.video_blocks, None)
    assert torch.equal(actual[:, exact], expected[:, exact])
    pairs = [places.unflatten(-1, (-1, 2)).sort(-1).values for places in (actual, expected)]
    # a key may fall to the other side of a split where rounding decides
    assert (pairs[0] == pairs[1]).float().mean() > 0.98


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 0.0])
def test_keys_without_an_order_keep_all_their_places(poison: float) -> None:
    layout = TokenLayout((2, 8, 8))
    _, k, _ = low_precision(random_inputs(layout, 64), torch.float32)
    k[:, :, 3:90] = poison
    order = plan(layout, GROUPED, DEVICE)
    places = triton_backend().sort_by_content(k, order.keys).cpu().view(-1, 64)
    assert torch.equal(places.sort(-1).values, order.keys.tokens.cpu().view(-1, 64).sort(-1).values.repeat(2, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity_caps_the_same_blocks(dtype: torch.dtype) -> None:
    """At one importance, both backends list the same blocks at the same levels."""
    layout, scale = TokenLayout((4, 12, 16), video_start=5), 0.125
    q, k, v = low_precision(random_inputs(layout, 64), dtype)
    host = tuple(x.cpu().double() for x in (q, k, v))
    host_prepared = reference.prepare(*host, plan(layout, CAPPED), CAPPED, scale)
    importance = reference.importance(host_prepared)
    codes = reference.select(host_prepared, importance)
    prepared = triton_backend().prepare(q, k, v, plan(layout, CAPPED, DEVICE), CAPPED, scale)
    selection = triton_backend().select(prepared, importance.to(DEVICE))
    order = prepared.order
    assert order.keys.last_video_count == order.keys.size  # else the last block is not listed
    video = codes[0, :, : order.queries.video_blocks, : order.keys.video_blocks]
    assert {0, 1, 2, 3, 255} == set(video.flatten().tolist())
    for h, i in product(range(video.shape[0]), range(video.shape[1])):
        listed = selection.indices[h, i].tolist()
        for slot, code in enumerate((0, 1, 2, 3)):
            count = int(selection.counts[h, i, slot])
            assert listed[:count] == (video[h, i] == code).nonzero().flatten().tolist()
            per_tile = max(64 // (order.keys.size >> code), 1)
            listed = listed[-(-count // per_tile) * per_tile :]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_zero_is_dense(dtype: torch.dtype, head_dim: int) -> None:
    layout = TokenLayout((3, 7, 10), video_start=9)
    q, k, v = low_precision(random_inputs(layout, head_dim), dtype)
    config = PSAConfig(error_weight=0.0)
    out, stats = psa_attention(q, k, v, layout=layout, config=config, backend="triton", stats=True)
    host, order = tuple(x.cpu() for x in (q, k, v)), plan(layout, config)
    codes = torch.zeros(1, 2, order.queries.blocks, order.keys.blocks, dtype=torch.uint8)
    unavoidable = rounding_error(*host, order, config, head_dim**-0.5, codes)
    assert_as_exact_as(out, dense_attention(*host), unavoidable)
    assert stats.density.cpu().tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("spread", [1.0, 4.0, 12.0], ids=lambda spread: f"logits up to {spread * spread:.0f}-fold")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_far_apart_logits_stay_finite_and_right(dtype: torch.dtype, spread: float) -> None:
    """Where neighbouring keys say nothing of a row's largest logit, the online softmax takes over."""
    layout = TokenLayout((3, 8, 10))
    q, k, v = low_precision(random_inputs(layout, 64, spread=spread), dtype)
    v = v / spread
    k = k.clone()
    k[:, :, 130] *= 3  # a key far from most queries' own neighbourhood
    host, config = tuple(x.cpu() for x in (q, k, v)), PSAConfig(error_weight=0.0)
    out = psa_attention(q, k, v, layout=layout, config=config, backend="triton")
    order = plan(layout, config)
    codes = torch.zeros(1, 2, order.queries.blocks, order.keys.blocks, dtype=torch.uint8)
    unavoidable = rounding_error(*host, order, config, 64**-0.5, codes)
    assert torch.isfinite(out).all()
    assert_as_exact_as(out, dense_attention(*host), unavoidable)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_weights_that_vanish_in_half_precision_are_done_again(dtype: torch.dtype) -> None:
    """Where neighbouring keys cancel in their mean, its logits are far below those of each: tiny weights."""
    layout, scale = TokenLayout((1, 16, 24)), 0.125
    config = PSAConfig(selection="topk", levels=("block",), ranges=((0, 1),), order="raster")
    q, k, v = random_inputs(layout, 64)
    sign = 1 - 2 * (torch.arange(layout.tokens) % 2)[:, None]
    q, k, v = low_precision((q / 4 + 2, k / 4 + 2 * sign, v), dtype)
    host, order = tuple(x.cpu() for x in (q, k, v)), plan(layout, config)
    codes = reference_codes(*host, order, config, scale)
    mean_key = host[1].double().mean(2, keepdim=True)
    largest = scale * (host[0].double() @ (host[1].double() - mean_key).mT).amax(-1)
    assert largest.min() > math.log(2.0**24)  # as much less is nothing in fp16
    out = psa_attention(q, k, v, layout=layout, config=config, scale=scale, backend="triton")
    exact = reference_output(*host, order, config, scale, codes)
    assert_as_exact_as(out, exact, rounding_error(*host, order, config, scale, codes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_are_over_the_tokens(dtype: torch.dtype) -> None:
    """Centred keys, and the power of values: no more and no fewer tokens than there are, however few."""
    layout = TokenLayout((1, 3, 5), video_start=4)
    q, k, v = low_precision(random_inputs(layout, 64, batch=BATCH, heads=2), dtype)
    k = k + 8
    order = plan(layout, MIXED, DEVICE)
    prepared = triton_backend().prepare(q, k, v, order, MIXED, 0.125)
    exact_k, exact_v = k.double().flatten(0, 1), v.double().flatten(0, 1)
    torch.testing.assert_close(prepared.value_power.double(), exact_v.square().sum(-1).mean(-1), rtol=1e-5, atol=0)
    centred = exact_k - exact_k.mean(1, keepdim=True)
    tokens = order.keys.tokens.long()
    places = (tokens >= 0).nonzero().squeeze(1)
    rows = prepared.keys[:, places]
    # the mean is several times what is left of a key
    assert relative_error(rows, centred[:, tokens[places]]) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_heads_in_chunks_change_no_bit(dtype: torch.dtype) -> None:
    layout = TokenLayout((3, 8, 10))
    q, k, v = low_precision(random_inputs(layout, 64, batch=2, heads=3), dtype)
    whole = psa_attention(q, k, v, layout=layout, config=MIXED, backend="triton")
    order = plan(layout, MIXED, DEVICE)
    per_head = triton_backend().workspace_bytes_per_head(q, order, MIXED)
    chunked_config = dataclasses.replace(MIXED, workspace_mib=-(-per_head // 2**20))
    chunked, stats = psa_attention(q, k, v, layout=layout, config=chunked_config, backend="triton", stats=True)
    assert torch.equal(whole, chunked)
    assert stats.density.shape == (2, 3)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_same_inputs_same_bits(dtype: torch.dtype) -> None:
    layout = TokenLayout((3, 8, 10), video_start=7)
    q, k, v = low_precision(random_inputs(layout, 64), dtype)
    before = torch.get_rng_state()
    runs = [psa_attention(q, k, v, layout=layout, config=MIXED, backend="triton") for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else [torch.float32], ids=str)  # half a minute each, interpreted
@pytest.mark.parametrize(
    "config",
    [MIXED, dataclasses.replace(TOPK, key_block=32), dataclasses.replace(CAPPED, key_block=128, variance_term=False)],
    ids=["error", "topk", "capped"],
)
def test_the_self_check_passes(config: PSAConfig, dtype: torch.dtype) -> None:
    check_once.__wrapped__(torch.device(DEVICE), dtype, 64, "triton", representative(config))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "layout", [TokenLayout((3, 9, 11), video_start=70), TokenLayout((4, 8, 8)), TokenLayout((1, 2, 3), 4)], ids=str
)
def test_the_kernels_warm_up(layout: TokenLayout, dtype: torch.dtype) -> None:
    """Launched ahead with empty lists, the attention kernel reads and writes nothing but its own; then all are."""
    q, k, v = low_precision(random_inputs(layout, 64), dtype)
    order = plan(layout, MIXED, DEVICE)
    import_module(f"{triton_backend().__name__}.warm_up").attend_to_nothing(q, order, MIXED, 0.125)
    triton_backend().warm_up(q, k, v, order, MIXED, 0.125)
    if ON_GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sm", [80, 86, 90, 100, 120])
def test_settings_of_every_gpu_generation_are_right(
    sm: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tile shapes than this device's own are other paths through the kernel."""
    triton = triton_backend()
    layout, config, scale = TokenLayout((2, 9, 11), video_start=5), MIXED, head_dim**-0.5
    monkeypatch.setattr(import_module(f"{triton.__name__}.plan"), "capability", lambda device: sm)
    q, k, v = low_precision(random_inputs(layout, head_dim, heads=1), dtype)
    host, host_order = tuple(x.cpu() for x in (q, k, v)), plan(layout, config)
    codes = reference_codes(*host, host_order, config, scale)
    order = plan(layout, config, DEVICE)
    prepared = triton.prepare(q, k, v, order, config, scale)
    video = codes[:, :, : order.queries.video_blocks, : order.keys.video_blocks]
    out = torch.full_like(q, float("nan"))
    triton.attend(prepared, triton.select_given(prepared, video.to(DEVICE)), out)
    exact = reference_output(*host, host_order, config, scale, codes)
    assert_as_exact_as(out, exact, rounding_error(*host, host_order, config, scale, codes))


SELECTIONS = {"error": MIXED, "topk": TOPK, "threshold": THRESHOLD, "capped": CAPPED}


@pytest.mark.skipif(not ON_GPU, reason="there is no device to wait for")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", SELECTIONS.values(), ids=SELECTIONS)
def test_a_call_never_waits_for_the_device(config: PSAConfig, dtype: torch.dtype) -> None:
    layout = TokenLayout((3, 9, 11), video_start=5)
    q, k, v = low_precision(random_inputs(layout, 64), dtype)
    order = plan(layout, config, DEVICE)

    def call() -> None:
        psa_attention(q, k, v, layout=layout, config=config, order=order, backend="triton", stats=True)

    call()  # compiled now
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_GPU, reason="the interpreter's memory says nothing")
@pytest.mark.parametrize("grid", [(6, 30, 52), (21, 128, 104)], ids=["usual", "rows too long to sort in place"])
@pytest.mark.parametrize("config", SELECTIONS.values(), ids=SELECTIONS)
def test_a_call_takes_the_memory_it_says(config: PSAConfig, grid: tuple[int, int, int]) -> None:
    """No more, and not much less."""
    layout, heads = TokenLayout(grid), 2
    q, k, v = torch.randn(3, 1, layout.tokens, heads, 128, device=DEVICE, dtype=torch.bfloat16).transpose(2, 3)
    order = plan(layout, config, DEVICE)
    said = heads * triton_backend().workspace_bytes_per_head(q, order, config)
    config = dataclasses.replace(config, workspace_mib=-(-said // 2**20))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # What is asked for: the allocator may give a tensor up to a MiB more.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    psa_attention(q, k, v, layout=layout, config=config, order=order, backend="triton", stats=True)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - q.nbytes
    assert 0.7 * said < taken <= config.workspace_mib * 2**20, (taken / 2**20, said / 2**20)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter's time says nothing")
def test_the_self_check_is_quick() -> None:
    """Under 50 ms, once its kernels are compiled."""
    arguments = (torch.device("cuda"), torch.bfloat16, 128, "triton", representative(MIXED))
    check_once.__wrapped__(*arguments)
    torch.cuda.synchronize()
    start = time.perf_counter()
    check_once.__wrapped__(*arguments)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [33, 34], ids=["sampled", "not sampled"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    "config",
    [
        MIXED,
        dataclasses.replace(TOPK, levels=(1, 2, 4, 8, "block")),
        THRESHOLD,
        dataclasses.replace(CAPPED, key_block=32),
    ],
    ids=["error", "topk", "threshold", "capped"],
)
def test_a_query_row_that_is_not_finite_spoils_no_other(
    config: PSAConfig, backend: str, token: int, value: float
) -> None:
    """What cannot be estimated for its block is attended at the finest level: the others come out at least as well."""
    layout = TokenLayout((3, 9, 11))
    config = dataclasses.replace(config, order="raster")  # token 32 is a row that the importance looks at, 34 is not
    q, k, v = low_precision(random_inputs(layout, 64, heads=1), torch.float32)
    exact = dense_attention(*(x.cpu() for x in (q, k, v)))
    q[0, 0, token - 1, 5] = value
    out = psa_attention(q, k, v, layout=layout, config=config, backend=backend)
    finite = torch.isfinite(out).all(-1)[0, 0].cpu()
    others = torch.arange(layout.tokens) != token - 1
    assert torch.equal(finite, others)
    block = others & (torch.arange(layout.tokens) < config.query_block)
    assert relative_error(out[:, :, block], exact[:, :, block]) < 0.5
