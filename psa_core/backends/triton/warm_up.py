"""Compilation of every kernel before the first call, the slowest at the same time as the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

from ...config import PSAConfig
from ...ordering import TokenOrder
from .attend import attend
from .importance import importance
from .plan import Plan
from .pyramid import prepare
from .select import select
from .storage import COUNTS, Prepared, PyramidRows, Selection, list_pitch


def warm_up(q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> None:
    """Compile what a call like this one launches. Triton's interpreter has nothing to compile.

    The attention kernel takes longer than all others together, so it has a thread of its own.
    """
    if q.device.type != "cuda":
        return
    triton.runtime.driver.active.get_current_target()  # loads the driver, which is not for two threads to do
    with ThreadPoolExecutor(1) as executor:
        attended = executor.submit(attend_to_nothing, q, order, config, scale)
        prepared = prepare(q, k, v, order, config, scale)
        select(prepared, importance(prepared))
        attended.result()


def attend_to_nothing(q: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> None:
    """Launch the attention kernel with keys and values of zero and empty lists of blocks."""
    z, rows = q.shape[0] * q.shape[1], PyramidRows.of(order, config)
    pairs = (z, order.queries.blocks, list_pitch(order.keys.video_blocks))
    unused = q.new_empty(0)
    with torch.cuda.device_of(q):  # each thread has a current device of its own
        pyramid = q.new_zeros(z, rows.total, q.shape[-1])
        prepared = Prepared(
            q=q,
            k=q,
            order=order,
            config=config,
            scale=scale,
            plan=Plan.of(q, order),
            rows=rows,
            keys=pyramid,
            values=pyramid,
            parts=unused,
            part_variance=unused,
            key_variance=unused,
            value_variance=unused,
            value_power=unused,
            query_squares=unused,
        )
        selection = Selection(
            indices=q.new_zeros(pairs, dtype=torch.int32),
            bias=q.new_zeros(pairs, dtype=torch.float32),
            counts=q.new_zeros(*pairs[:2], COUNTS.value, dtype=torch.int32),
        )
        attend(prepared, selection, torch.empty_like(q))
