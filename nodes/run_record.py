"""A finished sampling run in plain numbers, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..psa_core.config import Level


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
    """

    step: int
    block: int
    tokens: int
    batch: int
    seconds: float | None
    density: float | None
    level_pairs: tuple[int, ...]


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
        unused_cause: Why no video self-attention came by; empty where some did.
        levels: The preset's levels, from fine to coarse.
        calls: The video self-attention calls, in order; after a failure, those that were read from the device before.
    """

    title: str
    outcome: str
    seconds: float
    steps: int
    sparse_steps: int
    sparse_calls: int
    dense_calls: dict[str, int]
    dense_attention: str
    other_calls: int
    density: float | None
    tokens: int
    backend: str
    unused_cause: str
    levels: tuple[Level, ...]
    calls: tuple[CallRecord, ...]

    @property
    def speedup(self) -> float | None:
        """Median time of a dense call over that of a sparse one of the same size; None where one kind is missing."""
        return speedup(self.calls)

    @property
    def comparison(self) -> str:
        """The speedup in words; empty where it is not known, or the backend is not one to be fast."""
        return "" if self.backend == "reference" else compared_with_dense(self.calls)

    def summary(self) -> list[str]:
        """The run in short lines, to be read at a glance."""
        lines = []
        if self.unused_cause:
            lines += ["not used:", self.unused_cause]
        else:
            lines += filter(None, [self.comparison])
            lines.append(f"{self.sparse_steps} of {self.steps} steps sparse")
            if self.density is not None:
                lines.append(f"mean density {self.density:.2f} ({self.backend})")
        if self.dense_calls:
            most = "" if len(self.dense_calls) == 1 else ", most of them"
            lines.append(f"dense calls: {sum(self.dense_calls.values())}{most}")
            lines.append(max(self.dense_calls, key=lambda reason: self.dense_calls[reason]))
        return [*lines, f"{self.outcome} after {self.seconds:.1f} s"]

    def __str__(self) -> str:
        parts = []
        if self.unused_cause:
            parts.append(f"not used: {self.unused_cause}")
        else:
            density = "" if self.density is None else f" (mean density {self.density:.3f}, {self.backend})"
            faster = "" if (ratio := self.speedup) is None else f", {ratio:.1f}x dense speed"
            parts.append(f"{self.sparse_calls} sparse calls{density}{faster}")
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dense_calls.items())
            parts.append(f"{sum(self.dense_calls.values())} dense calls" + (f" ({reasons})" if reasons else ""))
            if self.dense_calls and self.dense_attention:
                # The other node's attention may be sparse as well: the line tells which of the two did what.
                parts[-1] += f", left to the attention of {self.dense_attention}"
            parts.append(f"{self.sparse_steps} of {self.steps} steps sparse")
            parts.append(f"{self.tokens} tokens")
        parts.append(f"{self.outcome} after {self.seconds:.1f} s")
        return "; ".join(parts)


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


def compared_with_dense(calls: Sequence[CallRecord]) -> str:
    """The speedup in words; empty where it is not known."""
    if not (ratio := speedup(calls)):
        return ""
    faster, slower = f"{ratio:.1f}", f"{1 / ratio:.1f}"
    if "1.0" in (faster, slower):
        return "attention as fast as dense"
    return f"attention {faster}x faster" if ratio > 1 else f"attention {slower}x slower"
