"""What PSA Quality Probe measures while a model samples: sparse calls against the dense attention in their place."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ..psa_core import PSAConfig
from ..psa_core.attention import PSAStats
from .shared_by_copies import PartOfARun
from .tally import Stopwatch
from .words import Words

Attend: TypeAlias = "Callable[..., tuple[Tensor, PSAStats]]"
"""``psa_attention`` with a call's own arguments, which answers with its statistics."""

SPREAD = (1 / 16, 1 / 4, 1, 4, 16)
"""Error weights that are tried, as multiples of the running one. The error grows with about the third root of the
weight (docs/presets.md), so they reach from two fifths to two and a half times the running error."""

USUAL_WEIGHT = 0.0017
"""What they are multiples of where the running weight is 0, and attention exact."""

LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # what the patch's input takes

_SHARE_UNITS = 10_000


@dataclass(frozen=True)
class ProbedCall:
    """A sparse call that was compared with dense attention.

    Args:
        step: Number of its noise level in the run, from 0.
        block: Transformer block.
        errors: Relative L2 distance from the dense output, for each config of the probe.
        densities: Share of dense work that was done, likewise.
    """

    step: int
    block: int
    errors: tuple[float, ...]
    densities: tuple[float, ...]


class Probe(PartOfARun):
    """Compares a share of a run's sparse calls with dense attention, at several error weights.

    Args:
        config: What the run computes with.
        share: Share of the sparse calls that is compared, above 0 and up to 1.

    Attributes:
        configs: What each compared call is computed with, by ascending error weight.
        running: Place of the run's own config among them; None where that is exact.
        calls: The comparisons that gave numbers.
        not_finite: Comparisons whose error was not finite; in ``dense_not_finite`` of them the dense output was not.
        dropped: Comparisons that could not be made, by reason.
        seconds: Time that comparing took on the device.
        elapsed: Time from the first model call to the latest reading.
    """

    def __init__(self, config: PSAConfig, share: float) -> None:
        self.configs = tuple(_variants(config))
        self.running = self.configs.index(config) if config in self.configs else None
        self.calls: list[ProbedCall] = []
        self.not_finite = 0
        self.dense_not_finite = 0
        self.dropped: Counter[Words] = Counter()
        self.seconds = 0.0
        self.elapsed = 0.0
        self._config = config
        self._units = max(round(share * _SHARE_UNITS), 1)
        self._began: float | None = None
        self._pending: list[tuple[int, int, Tensor]] = []
        self._watches: list[Stopwatch] = []
        self._recording = threading.Lock()  # one thread for each GPU that a batch is spread over

    def begin_model_call(self) -> None:
        """Note when the first model call began: loading the model is no part of the time of sampling."""
        if self._began is None:
            self._began = time.perf_counter()

    def wants(self, step: int, block: int) -> bool:
        """Whether a call is in the share: evenly spread blocks in each step, the next ones in the next step."""
        return (step + block) * self._units % _SHARE_UNITS < self._units

    def see(
        self,
        step: int,
        block: int,
        out: Tensor,
        stats: PSAStats,
        attend: Attend,
        dense: Callable[[], Tensor],
    ) -> None:
        """Compare a call, if it is in the share. Whatever goes wrong costs this comparison, not the run.

        Args:
            out: The call's sparse output ``[B, H, N, D]``, with its statistics.
            attend: Computes the call with another config in place of the run's own, whose weight is multiplied as that
                is.
            dense: Computes ``[B, H, N, D]`` as without PSA.
        """
        if not self.wants(step, block):
            return
        watch, numbers = Stopwatch(out.device), None
        try:
            # Another node's dense attention may draw random numbers, which are the sampler's.
            with torch.random.fork_rng([out.device] if out.device.type == "cuda" else []):
                numbers = self._measure(out, stats, attend, dense)
        except InterruptProcessingException:
            raise
        except torch.OutOfMemoryError:
            reason = Words.of("no_memory")
        except Exception as error:
            reason = Words.of("after_error", error=Words.of_exception(error))
        watch.stop()
        with self._recording:
            self._watches.append(watch)
            if numbers is None:
                self.dropped[reason] += 1
            else:
                self._pending.append((step, block, numbers))

    def read(self) -> None:
        """Fetch what has been measured since the last time from the device."""
        with self._recording:
            pending, self._pending = self._pending, []
            watches, self._watches = self._watches, []
        for step, block, numbers in pending:
            (dense_size, *errors), (_, *densities) = numbers.tolist()
            if _finite(errors):
                self.calls.append(ProbedCall(step, block, tuple(errors), tuple(densities)))
            else:
                self.not_finite += 1
                self.dense_not_finite += not _finite([dense_size])
        self.seconds += sum(watch.seconds() for watch in watches)
        if self._began is not None:
            self.elapsed = time.perf_counter() - self._began

    @property
    def slowdown(self) -> float:
        """Time that sampling took over what it would have taken without probing."""
        return self.elapsed / max(self.elapsed - self.seconds, 1e-9) if self.elapsed else 1.0

    def _measure(
        self,
        out: Tensor,
        stats: PSAStats,
        attend: Attend,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        """Norm of the dense output and 0, then error and density of every config ``[2, 1 + configs]``."""
        reference = dense()
        size = _norm(reference)
        errors, densities = [size], [torch.zeros_like(size)]
        for config in self.configs:
            other, counted = (out, stats) if config is self._config else attend(config=config)
            errors.append(_distance(other, reference) / size)
            densities.append(counted.density.mean())
            del other  # one output beside the dense one at a time
        return torch.stack((torch.stack(errors), torch.stack(densities)))


def _variants(config: PSAConfig) -> list[PSAConfig]:
    """The config with each error weight to try, ascending; itself alone where it does not select by error."""
    if config.selection != "error":
        return [config]
    middle = config.error_weight or USUAL_WEIGHT
    weights = {min(max(middle * factor, LEAST_WEIGHT), LARGEST_WEIGHT) for factor in SPREAD} - {config.error_weight}
    variants = [dataclasses.replace(config, error_weight=weight) for weight in weights]
    variants += [config] if config.error_weight else []
    return sorted(variants, key=lambda variant: variant.error_weight or 0.0)


def _distance(out: Tensor, reference: Tensor) -> Tensor:
    """L2 distance of two outputs ``[B, H, N, D]``, fp32; head by head, so that it takes little memory."""
    pairs = zip(out.unbind(1), reference.unbind(1), strict=True)
    return torch.stack([(a.float() - b.float()).square().sum() for a, b in pairs]).sum().sqrt()


def _norm(out: Tensor) -> Tensor:
    return torch.stack([head.float().square().sum() for head in out.unbind(1)]).sum().sqrt()


def _finite(numbers: Sequence[float]) -> bool:
    return all(abs(number) < float("inf") for number in numbers)  # as NaN is not
