"""Time, peak memory and error of one way to attend."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ERROR_HEADS = 6

Result = TypeVar("Result")


def timed(run: Callable[[], Result], repeats: int) -> tuple[Result, float, float]:
    """Result, median milliseconds, and peak memory in MiB beyond what the result takes."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - max(torch.cuda.memory_allocated(), before)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:  # as in a model, the CPU launches one run while the GPU is still busy with another
        result = run()
        mark.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in pairwise(marks)]
    return result, sorted(times)[repeats // 2], extra / 2**20


def sample_heads(heads: int) -> list[int]:
    """Heads that errors are taken on."""
    return sorted({round(i * (heads - 1) / (ERROR_HEADS - 1)) for i in range(ERROR_HEADS)})


def exact_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of the sampled heads in fp32 ``[1, sampled heads, N, D]``."""
    chosen = sample_heads(q.shape[1])
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        parts = [scaled_dot_product_attention(*(x[:, h : h + 1].float() for x in (q, k, v))) for h in chosen]
    return torch.cat(parts, dim=1)


def errors(out: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative L2 and L1 error, and the worst head's relative L2 error."""
    apart = out[:, sample_heads(out.shape[1])].float() - exact
    by_head = apart.norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
    return {
        "rel_l2": float(apart.norm() / exact.norm()),
        "rel_l1": float(apart.abs().sum() / exact.abs().sum()),
        "worst_head": float(by_head.max()),
    }
