"""Attention calls whose numbers are still on their way from the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..psa_core.attention import PSAStats
from .run_record import CallRecord


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
    """A call whose numbers are still on their way from the device."""

    step: int
    block: int
    tokens: int
    batch: int
    watch: Stopwatch
    stats: PSAStats | None

    def read(self) -> CallRecord:
        density, pairs = None, ()
        if self.stats is not None:
            density = float(self.stats.density.mean())
            pairs = tuple(self.stats.level_pairs.flatten(0, -2).sum(dim=0).tolist())
        return CallRecord(self.step, self.block, self.tokens, self.batch, self.watch.seconds(), density, pairs)


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
