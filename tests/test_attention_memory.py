"""What happens where the workspace does not fit into memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from psa_pack.psa_core import PSAConfig, TokenLayout, psa_attention
from psa_pack.psa_core.backends import reference
from torch import Tensor

from oracle import random_inputs


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
            kept.append(weakref.ref(prepared.queries))
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
