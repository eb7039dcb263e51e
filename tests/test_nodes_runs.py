"""Whole sampling runs of Wan: what is planned for them, and models whose latents are none of Wan 2.1's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from psa_pack.psa_core.models.wan import WAN22_5B

from runs import record
from test_nodes_patch import EVERYWHERE, SPARSE, distance, patch
from tiny_wan import BLOCKS, LATENT, TOKENS, make_model, sample

pytestmark = pytest.mark.usefixtures("one_thread", "comfyui")


def test_an_order_is_planned_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import session

    planned: Counter[int] = Counter()
    plan_order = session.plan_order

    def counting(layout: Any, *args: Any) -> Any:
        planned[layout.tokens] += 1
        return plan_order(layout, *args)

    monkeypatch.setattr(session, "plan_order", counting)
    patched = patch(make_model(), **SPARSE)
    sample(patched, steps=10, negative_context=100)  # texts of two lengths: two calls of the model in a step
    assert record(patched).sparse_calls == 10 * 2 * BLOCKS
    assert planned == {TOKENS: 1}


@pytest.mark.parametrize("start_image", [False, True])
def test_wan_2_2_5b_with_and_without_an_image_to_start_from(start_image: bool) -> None:
    """Its latents have 48 channels; the frame of an image has a noise level of its own, zero."""
    model = make_model(in_dim=48, out_dim=48)
    assert type(model.model).__name__ == "WAN22"
    mask = None
    if start_image:
        mask = torch.ones(1, 1, *LATENT)
        mask[:, :, 0] = 0
    run = {"channels": WAN22_5B.out_channels, "noise_mask": mask}
    dense = sample(model, **run)
    patched = patch(model, **EVERYWHERE, error_weight=0.0)
    assert distance(sample(patched, **run), dense) < 1e-5
    assert (record(patched).sparse_calls, record(patched).tokens) == (4 * BLOCKS, TOKENS)
    half = patch(model, **SPARSE | {"start_percent": 0.5})
    assert 0 < distance(sample(half, **run), dense) < 0.1
    assert (record(half).steps, record(half).sparse_steps) == (4, 2)
