"""What the calls of a finished run add up to: the numbers that PSA Report shows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .run_record import CallRecord, RunRecord


@dataclass(frozen=True)
class RunFacts:
    """A run, added up. A step and a block often have several calls: one for each condition, or part of a batch.

    Args:
        density: Mean share of dense work ``[blocks, steps]``, a dense call counting 1; NaN where no call was.
        dense: Where every call was dense ``[blocks, steps]``, bool.
        shares: Shares of each step ``[steps, levels + 1]``: block pairs at each level of the preset, and last the calls
            that stayed dense. A row sums to 1, or to 0 where no call was.
        level_shares: Share of the sparse calls' block pairs at each level of the preset ``[levels]``; zeros without a
            sparse call.
        sparse_seconds: Time in sparse calls.
        dense_seconds: Time in dense calls.
        estimate: Seconds that the sparse calls would have taken dense, each like the median of the dense calls of its
            size; None without a sparse call, or where a size has no dense call.
        unmatched: Number of sparse calls of such sizes.
    """

    density: NDArray[np.float64]
    dense: NDArray[np.bool_]
    shares: NDArray[np.float64]
    level_shares: NDArray[np.float64]
    sparse_seconds: float
    dense_seconds: float
    estimate: float | None
    unmatched: int

    @classmethod
    def of(cls, run: RunRecord) -> RunFacts:
        """Add up a run's calls."""
        steps = max([run.steps, *(call.step + 1 for call in run.calls)])
        blocks = max((call.block + 1 for call in run.calls), default=0)
        total, calls, sparse = (np.zeros((blocks, steps)) for _ in range(3))
        shares = np.zeros((steps, len(run.levels) + 1))
        level_shares = np.zeros(len(run.levels))
        for call in run.calls:
            place = call.block, call.step
            calls[place] += 1
            if call.density is None:
                total[place] += 1
                shares[call.step, -1] += 1
            else:
                total[place] += call.density
                sparse[place] += 1
                pairs = np.asarray(call.level_pairs, dtype=np.float64)
                shares[call.step, :-1] += pairs / max(pairs.sum(), 1)
                level_shares += pairs / max(pairs.sum(), 1)
        with np.errstate(invalid="ignore"):
            density = total / calls
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
        estimate, unmatched = _dense_estimate(run.calls)
        return cls(
            density=density,
            dense=(calls > 0) & (sparse == 0),
            shares=shares,
            level_shares=level_shares / max(level_shares.sum(), 1e-12),
            sparse_seconds=_seconds(call for call in run.calls if call.density is not None),
            dense_seconds=_seconds(call for call in run.calls if call.density is None),
            estimate=estimate,
            unmatched=unmatched,
        )


def _seconds(calls: Iterable[CallRecord]) -> float:
    return sum(call.seconds or 0.0 for call in calls)


def _dense_estimate(calls: Sequence[CallRecord]) -> tuple[float | None, int]:
    times: dict[tuple[int, int], list[float]] = {}
    for call in calls:
        if call.density is None and call.seconds is not None:
            times.setdefault((call.tokens, call.batch), []).append(call.seconds)
    medians = {size: statistics.median(seconds) for size, seconds in times.items()}
    sizes = [(call.tokens, call.batch) for call in calls if call.density is not None]
    if unmatched := sum(size not in medians for size in sizes):
        return None, unmatched
    return (sum(medians[size] for size in sizes) if sizes else None), 0
