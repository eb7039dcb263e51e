"""A finished sampling run in plain numbers, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..psa_core.config import Level
from .words import Words, plain

_STEPS_SHOWN = 6


@dataclass(frozen=True)
class CallRecord:
    """One video self-attention call of a run.

    Args:
        step: Number of its noise level, from 0.
        block: Transformer block, where ComfyUI names it; else its place among the model call's video calls.
        tokens: Length of its sequence.
        batch: Number of sequences in it; where the model takes both conditions at once, two for each video.
        seconds: How long it took on its device; None if it failed.
        density: Share of dense work that was done; None for a dense call.
        level_pairs: Number of block pairs at each level of the preset; empty for a dense call.
        error_weight: What it was computed with; None for a dense call, and where levels are not chosen by error.
    """

    step: int
    block: int
    tokens: int
    batch: int
    seconds: float | None
    density: float | None
    level_pairs: tuple[int, ...]
    error_weight: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """A finished sampling run in plain numbers.

    Args:
        title: The preset.
        outcome: ``finished``, ``interrupted`` or ``failed``.
        seconds: Duration of the run.
        steps: Noise levels at which the model was called.
        sparse_steps: Those with at least one sparse call.
        sparse_calls: Attention calls that PSA computed.
        dense_calls: Video self-attention calls that stayed dense, by reason.
        dense_attention: The other node whose attention answered those; empty for ComfyUI's own.
        other_calls: Attention calls of other kinds (cross attention), which PSA leaves alone.
        density: Mean over the sparse calls of the share of dense work that was done; None without any.
        tokens: Length of the longest video sequence.
        backend: Backend of the sparse calls; empty without any.
        unused_cause: Why no video self-attention came by; None where some did.
        levels: The preset's levels, from fine to coarse.
        calls: The video self-attention calls, in order; after a failure, those that were read from the device before.
    """

    title: str
    outcome: str
    seconds: float
    steps: int
    sparse_steps: int
    sparse_calls: int
    dense_calls: dict[Words, int]
    dense_attention: str
    other_calls: int
    density: float | None
    tokens: int
    backend: str
    unused_cause: Words | None
    levels: tuple[Level, ...]
    calls: tuple[CallRecord, ...]

    @property
    def speedup(self) -> float | None:
        """Median time of a dense call over that of a sparse one of the same size; None where one kind is missing."""
        return speedup(self.calls)

    @property
    def pace(self) -> Pace | None:
        """How fast attention was; None where it is not known, or the backend is not one to be fast."""
        return None if self.backend == "reference" else pace(self.calls)

    @property
    def weights(self) -> tuple[float, float] | None:
        """Least and largest error weight of its sparse calls; None where no call had one."""
        return _least_and_largest(self.calls)

    @property
    def weights_by_step(self) -> dict[int, tuple[float, float]]:
        """Likewise for each step, from 0, that has such calls."""
        by_step: dict[int, list[CallRecord]] = {}
        for call in self.calls:
            by_step.setdefault(call.step, []).append(call)
        found = {step: _least_and_largest(calls) for step, calls in sorted(by_step.items())}
        return {step: weights for step, weights in found.items() if weights is not None}

    def summary(self) -> list[Words]:
        """The run in short lines, to be read at a glance."""
        lines: list[Words] = []
        if self.unused_cause is not None:
            lines += [Words.of("not_used"), self.unused_cause]
        else:
            lines += self.what_was_sparse()
        if self.dense_calls:
            several = len(self.dense_calls) > 1
            lines.append(Words.of("most_dense_calls" if several else "dense_calls", count=self.dense_count))
            lines.append(max(self.dense_calls, key=lambda reason: self.dense_calls[reason]))
        return [*lines, self.ending]

    def what_was_sparse(self) -> list[Words]:
        """Pace, steps, density and, where it varies, the error weight, a line each."""
        lines = [] if self.backend == "reference" else compared_with_dense(self.calls)
        lines.append(Words.of("steps_sparse", sparse=self.sparse_steps, steps=self.steps))
        if self.density is not None:
            lines.append(Words.of("mean_density", density=self.density, backend=self.backend))
        return [*lines, *self.range_of_weights()]

    def range_of_weights(self) -> list[Words]:
        """The error weights in a line; none where all calls had the same."""
        if (weights := self.weights) is None or weights[0] == weights[1]:
            return []
        least, largest = (plain(weight, digits=2) for weight in weights)
        return [Words.of("weight_range", least=least, largest=largest)]

    def weights_of_steps(self) -> list[Words]:
        """Those of some steps, the first and the last among them, in a line; none where all calls had the same."""
        if not self.range_of_weights():
            return []
        by_step = list(self.weights_by_step.items())
        places = sorted({round(part * (len(by_step) - 1) / (_STEPS_SHOWN - 1)) for part in range(_STEPS_SHOWN)})
        return [Words.of("weights_by_step", steps=tuple(_weight_of_step(*by_step[place]) for place in places))]

    @property
    def dense_count(self) -> int:
        """Number of video self-attention calls that stayed dense."""
        return sum(self.dense_calls.values())

    @property
    def ending(self) -> Words:
        """How the run ended, and when."""
        return Words.of(self.outcome, seconds=self.seconds)

    def in_one_line(self) -> Words:
        """The run for the log."""
        if self.unused_cause is not None:
            return Words.of("run", parts=(Words.of("unused", cause=self.unused_cause), self.ending))
        count = Words.of("sparse_count", count=self.sparse_calls)
        if self.density is not None:
            count = Words.of(
                "sparse_count_and_density", count=self.sparse_calls, density=self.density, backend=self.backend
            )
        ratio = self.speedup
        faster = () if ratio is None else (Words.of("times_dense_speed", times=ratio),)
        dense = Words.of("dense_count", count=self.dense_count)
        if self.dense_calls:
            reasons = tuple(
                Words.of("counted", count=count, reason=reason) for reason, count in self.dense_calls.items()
            )
            dense = Words.of("dense_reasons", count=self.dense_count, reasons=reasons)
            if self.dense_attention:
                # The other node's attention may be sparse as well: the line tells which of the two did what.
                dense = Words.of("left_to", calls=dense, owner=self.dense_attention)
        parts = (
            Words.of("sparse_calls", facts=(count, *faster, *self.range_of_weights())),
            dense,
            Words.of("steps_sparse", sparse=self.sparse_steps, steps=self.steps),
            Words.of("tokens", tokens=self.tokens),
            self.ending,
        )
        return Words.of("run", parts=parts)

    def __str__(self) -> str:
        return str(self.in_one_line())

    def as_json(self) -> dict[str, Any]:
        """The run without its single calls, for programs that queue workflows."""
        return {
            "title": self.title,
            "outcome": self.outcome,
            "seconds": self.seconds,
            "steps": self.steps,
            "sparse_steps": self.sparse_steps,
            "sparse_calls": self.sparse_calls,
            "dense_calls": {str(reason): count for reason, count in self.dense_calls.items()},
            "density": self.density,
            "error_weights": None if self.weights is None else list(self.weights),
            "tokens": self.tokens,
            "backend": self.backend,
            "unused_cause": "" if self.unused_cause is None else str(self.unused_cause),
        }


@dataclass(frozen=True)
class Pace:
    """Sparse calls against dense ones, as people say it.

    Args:
        kind: Key of its sentence.
        times: So many times, 1 or more.
    """

    kind: Literal["faster", "slower", "as_fast"]
    times: float


def _least_and_largest(calls: Sequence[CallRecord]) -> tuple[float, float] | None:
    weights = [call.error_weight for call in calls if call.error_weight is not None]
    return (min(weights), max(weights)) if weights else None


def _weight_of_step(step: int, weights: tuple[float, float]) -> Words:
    least, largest = (plain(weight, digits=2) for weight in weights)
    if least == largest:
        return Words.of("weight_of_step", step=step + 1, weight=least)
    return Words.of("weights_of_step", step=step + 1, least=least, largest=largest)


def speedup(calls: Sequence[CallRecord]) -> float | None:
    """Median time of a dense call over that of a sparse one, at the largest size that has both; None without."""
    times: dict[tuple[int, int], tuple[list[float], list[float]]] = {}
    for call in calls:
        if call.seconds is not None:
            size = (call.tokens, call.batch)
            times.setdefault(size, ([], []))[call.density is not None].append(call.seconds)
    both = [size for size, (dense, sparse) in times.items() if dense and sparse]
    if not both:
        return None
    dense, sparse = times[max(both)]
    return statistics.median(dense) / max(statistics.median(sparse), 1e-9)


def pace(calls: Sequence[CallRecord]) -> Pace | None:
    """The speedup as people say it; None where it is not known."""
    if not (ratio := speedup(calls)):
        return None
    times = max(ratio, 1 / ratio)
    if round(times, 1) == 1 or round(1 / times, 1) == 1:
        return Pace("as_fast", 1.0)
    return Pace("faster" if ratio > 1 else "slower", times)


def compared_with_dense(calls: Sequence[CallRecord]) -> list[Words]:
    """The pace in a line; none where it is not known."""
    if (found := pace(calls)) is None:
        return []
    return [Words.of("as_fast") if found.kind == "as_fast" else Words.of(found.kind, times=found.times)]
