"""What a run has done so far: its steps, and its calls, whose numbers are read from the device once a step."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..psa_core.attention import PSAStats
from ..psa_core.config import Level
from .run_record import CallRecord, RunRecord
from .words import Words


class Stopwatch:
    """Time between construction and ``stop`` on a device, without waiting for it until ``seconds`` is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record(stream)
        else:
            self._seconds = -time.perf_counter()

    def stop(self) -> None:
        if self._events is not None:
            self._events[1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds += time.perf_counter()

    def seconds(self) -> float:
        if self._events is None:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


@dataclass
class PendingCall:
    """A call whose numbers are still on their way from the device; ``stats`` is None for a dense one, as is
    ``error_weight``."""

    step: int
    block: int
    tokens: int
    batch: int
    watch: Stopwatch
    stats: PSAStats | None
    error_weight: float | None = None

    def read(self) -> CallRecord:
        density: float | None = None
        pairs: tuple[int, ...] = ()
        if self.stats is not None:
            density = float(self.stats.density.mean())
            pairs = tuple(self.stats.level_pairs.flatten(0, -2).sum(dim=0).tolist())
        return CallRecord(
            self.step, self.block, self.tokens, self.batch, self.watch.seconds(), density, pairs, self.error_weight
        )


def read_calls(calls: Sequence[PendingCall]) -> list[CallRecord]:
    """Read calls with two transfers from each device, where one by one each would take two, and the device wait."""
    sparse: dict[torch.device, list[tuple[PendingCall, PSAStats]]] = {}
    for call in calls:
        if call.stats is not None:
            sparse.setdefault(call.stats.density.device, []).append((call, call.stats))
    for group in sparse.values():
        sizes = [stats.density.numel() for _, stats in group]
        densities = torch.cat([stats.density.flatten() for _, stats in group]).cpu().split(sizes)
        pairs = torch.cat([stats.level_pairs.flatten(0, -2) for _, stats in group]).cpu().split(sizes)
        for (call, _), *numbers in zip(group, densities, pairs, strict=True):
            call.stats = PSAStats(*numbers)
    return [call.read() for call in calls]


@dataclass
class Step:
    """Counts of one noise level.

    Args:
        number: Its place in the run, from 0.
        sigma: The noise level.
        sparse: Sparse calls.
        dense: Video self-attention calls that stayed dense, by reason.
    """

    number: int
    sigma: float
    sparse: int = 0
    dense: Counter[Words] = field(default_factory=Counter)


class Tally:
    """Counts one run. ComfyUI calls the model from a thread for each GPU where it spreads a batch over several.

    Attributes:
        calls: The calls that have been read from the device.
        longest: Tokens of the longest sequence.
    """

    def __init__(self) -> None:
        self.calls: list[CallRecord] = []
        self.longest = 0
        self._began = time.perf_counter()
        self._counting = threading.Lock()
        self._step: Step | None = None
        self._steps = self._sparse_steps = self._sparse_calls = self._other_calls = 0
        self._dense_calls: Counter[Words] = Counter()
        self._dense_attention = ""
        self._pending: list[PendingCall] = []

    @property
    def step(self) -> Step:
        """The current one."""
        assert self._step is not None, "an attention call came before its model call"
        return self._step

    @property
    def density(self) -> float | None:
        """Mean over the sparse calls that have been read; None without any."""
        densities = [call.density for call in self.calls if call.density is not None]
        return statistics.fmean(densities) if densities else None

    def begin_model_call(self, sigma: float, tokens: int, dense_attention: str) -> Step | None:
        """Note a call of the model; the step that has ended with it, where the noise level is another one."""
        with self._counting:
            self._dense_attention = dense_attention
            self.longest = max(self.longest, tokens)
            if self._step is not None and sigma == self._step.sigma:
                return None
            ended = self._end_step()
            self._step = Step(self._steps, sigma)
            return ended

    def end(self) -> Step | None:
        """Note that no step follows; the last one, if there was any."""
        with self._counting:
            return self._end_step()

    def count_other(self) -> None:
        """Count an attention call that is not the video's self-attention."""
        with self._counting:
            self._other_calls += 1

    def count_dense(self, reason: Words) -> None:
        """Count a video self-attention call that stays dense."""
        with self._counting:
            self.step.dense[reason] += 1

    def add(
        self,
        block: int,
        tokens: int,
        batch: int,
        watch: Stopwatch,
        stats: PSAStats | None,
        error_weight: float | None,
    ) -> None:
        """Record a call; one with statistics counts as sparse."""
        with self._counting:
            self._pending.append(PendingCall(self.step.number, block, tokens, batch, watch, stats, error_weight))
            self.step.sparse += stats is not None

    def read(self) -> None:
        """Fetch what has been recorded since the last time from the device."""
        with self._counting:
            pending, self._pending = self._pending, []
        calls = read_calls(pending)
        with self._counting:
            self.calls += calls

    def forget(self) -> None:
        """Let go of what has not been read."""
        with self._counting:
            self._pending.clear()

    def record(
        self, title: str, outcome: str, backends: set[str], levels: tuple[Level, ...], unsupported: Words | None
    ) -> RunRecord:
        """The run in plain numbers; ``unsupported`` tells why PSA did not know the model, if so."""
        return RunRecord(
            title=title,
            outcome=outcome,
            seconds=time.perf_counter() - self._began,
            steps=self._steps,
            sparse_steps=self._sparse_steps,
            sparse_calls=self._sparse_calls,
            dense_calls=dict(self._dense_calls),
            dense_attention=self._dense_attention,
            other_calls=self._other_calls,
            density=self.density,
            tokens=self.longest,
            backend=", ".join(sorted(backends)) if self._sparse_calls else "",
            unused_cause=self._unused_cause(unsupported),
            levels=levels,
            calls=tuple(self.calls),
        )

    def _end_step(self) -> Step | None:
        ended, self._step = self._step, None
        if ended is not None:
            self._steps += 1
            self._sparse_steps += ended.sparse > 0
            self._sparse_calls += ended.sparse
            self._dense_calls.update(ended.dense)
        return ended

    def _unused_cause(self, unsupported: Words | None) -> Words | None:
        if self._sparse_calls or self._dense_calls:
            return None
        if unsupported is not None:
            return unsupported
        if not self.longest:
            return Words.of("no_model_call")
        if not self._other_calls:
            return Words.of("no_call")
        return Words.of("no_video_call", tokens=self.longest)
