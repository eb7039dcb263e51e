"""What one sampling run knows and decides; its tensors die with it, a record of plain numbers remains."""

from __future__ import annotations

import logging
import statistics
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ..psa_core import TokenLayout, TokenOrder, backends, plan_order, psa_attention
from ..psa_core.attention import PSAStats
from ..psa_core.config import Level
from ..psa_core.presets import Preset
from ..psa_core.self_check import SelfCheckFailed, self_check

try:
    from comfy.model_prefetch import pause_malloc_graph
except ImportError:  # a ComfyUI that does not record allocations
    from contextlib import nullcontext as pause_malloc_graph

# A scheduler's sigma may lie a rounding error above the one that percent_to_sigma gives for the same step.
_SIGMA_TOLERANCE = 1e-6

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchSettings:
    """What the patch node was asked for.

    Args:
        title: The preset, for messages.
        note: What the user should know about the choice of preset; empty if nothing.
        preset: The preset, with the node's own values in place.
        dense_blocks: Indices of the transformer blocks that stay dense.
        backend: ``auto``, ``triton`` or ``reference``.
        verbose: Log every step.
    """

    title: str
    note: str
    preset: Preset
    dense_blocks: frozenset[int]
    backend: str
    verbose: bool


@dataclass(frozen=True)
class CallRecord:
    """One video self-attention call of a run.

    Args:
        step: Number of its noise level, from 0.
        block: Transformer block, where ComfyUI names it; else its place among the model call's video calls.
        tokens: Length of its sequence.
        seconds: How long it took on its device; None if it failed.
        density: Share of dense work that was done; None for a dense call.
        level_pairs: Number of block pairs at each level of the preset; empty for a dense call.
    """

    step: int
    block: int
    tokens: int
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
        other_calls: Attention calls of other kinds (cross attention), which PSA leaves alone.
        density: Mean over the sparse calls of the share of dense work that was done; None without any.
        tokens: Length of the longest video sequence.
        backend: Backend of the sparse calls; empty without any.
        unused_cause: Why no video self-attention came by; empty where some did.
        levels: The preset's levels, from fine to coarse.
        calls: The video self-attention calls, in order; empty after a failure.
    """

    title: str
    outcome: str
    seconds: float
    steps: int
    sparse_steps: int
    sparse_calls: int
    dense_calls: dict[str, int]
    other_calls: int
    density: float | None
    tokens: int
    backend: str
    unused_cause: str
    levels: tuple[Level, ...]
    calls: tuple[CallRecord, ...]

    @property
    def speedup(self) -> float | None:
        """Median time of a dense call over that of a sparse one of the same length; None where one kind is missing."""
        return speedup(self.calls)

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
            parts.append(f"{self.sparse_steps} of {self.steps} steps sparse")
            parts.append(f"{self.tokens} tokens")
        parts.append(f"{self.outcome} after {self.seconds:.1f} s")
        return "; ".join(parts)


def speedup(calls: Sequence[CallRecord]) -> float | None:
    """Median time of a dense call over that of a sparse one, at the longest length that has both; None without."""
    times: dict[int, tuple[list[float], list[float]]] = {}
    for call in calls:
        if call.seconds is not None:
            times.setdefault(call.tokens, ([], []))[call.density is not None].append(call.seconds)
    both = [tokens for tokens, (dense, sparse) in times.items() if dense and sparse]
    if not both:
        return None
    dense, sparse = times[max(both)]
    return statistics.median(dense) / max(statistics.median(sparse), 1e-9)


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
class _PendingCall:
    """A call whose numbers are still on their way from the device."""

    step: int
    block: int
    tokens: int
    watch: Stopwatch
    stats: PSAStats | None

    def read(self) -> CallRecord:
        density, pairs = None, ()
        if self.stats is not None:
            density = float(self.stats.density.mean())
            pairs = tuple(self.stats.level_pairs.sum(dim=(0, 1)).tolist())
        return CallRecord(self.step, self.block, self.tokens, self.watch.seconds(), density, pairs)


@dataclass
class _Step:
    """Counts of one noise level."""

    sigma: float
    window_reason: str | None
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)


class Session:
    """One sampling run of a patched model.

    Args:
        settings: What the patch node was asked for.
        percent_to_sigma: The running model's own; a node after the patch may have changed it.
        report: Shows a text to the user.
    """

    def __init__(
        self, settings: PatchSettings, percent_to_sigma: Callable[[float], float], report: Callable[[str], None]
    ) -> None:
        schedule = settings.preset.schedule
        self.settings = settings
        self._sigma_start = float(percent_to_sigma(schedule.start_percent))
        self._sigma_end = float(percent_to_sigma(schedule.end_percent))
        self._report = report
        self._began = time.perf_counter()
        self._orders: dict[tuple[TokenLayout, torch.device], TokenOrder] = {}
        self._backends: dict[tuple[torch.device, torch.dtype, int], str] = {}
        self._failure: str | None = None
        self._unsupported: str | None = None
        self._step: _Step | None = None
        # ComfyUI calls the model from a thread for each GPU where it spreads a batch over several.
        self._counting = threading.Lock()
        self._steps = self._sparse_steps = self._sparse_calls = self._other_calls = self._tokens = 0
        self._dense_calls: Counter[str] = Counter()
        self._pending: list[_PendingCall] = []
        self._calls: list[CallRecord] = []

    def begin_model_call(self, sigma: float, layout: TokenLayout) -> None:
        """Note that the model is called at a noise level; another level than before begins a step."""
        with self._counting:
            self._tokens = max(self._tokens, layout.tokens)
            if self._step is None or sigma != self._step.sigma:
                before, self._step = self._step, _Step(sigma, self._window_reason(sigma))
                self._close(before)

    def refuse_model(self, reason: str) -> None:
        """Note that the model called is none that PSA knows."""
        self._unsupported = reason

    def count_other(self) -> None:
        """Count an attention call that is not the video's self-attention."""
        with self._counting:
            self._other_calls += 1

    def count_dense(self, reason: str) -> None:
        """Count a video self-attention call that stays dense."""
        with self._counting:
            self._current_step.dense[reason] += 1

    def dense_reason(self, layout: TokenLayout, block: int | None) -> str | None:
        """Why a video self-attention call stays dense by the schedule, or None if it may be sparse.

        Args:
            layout: The call's tokens.
            block: Index of the transformer block that it is in, if known.
        """
        if self._failure is not None:
            return f"because PSA could not run ({self._failure})"
        if (reason := self._current_step.window_reason) is not None:
            return reason
        least = self.settings.preset.schedule.min_tokens
        if layout.tokens < least:
            return f"shorter than min_tokens {least}"
        if self.settings.dense_blocks and block is None:
            return "in a block that ComfyUI does not name, while dense_blocks is set"
        if block in self.settings.dense_blocks:
            return "in dense_blocks"
        return None

    @contextmanager
    def timed_dense(self, device: torch.device, tokens: int, block: int) -> Iterator[None]:
        """Time a video self-attention call that stays dense."""
        watch = Stopwatch(device)
        yield
        watch.stop()
        with self._counting:
            self._pending.append(_PendingCall(self._steps, block, tokens, watch, None))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, scale: float | None, block: int
    ) -> Tensor | None:
        """Compute a call sparsely.

        Args:
            q: Queries ``[B, H, N, D]``; k and v likewise.
            block: Where the record of the call belongs.

        Returns:
            The output in q's memory layout, or None after a failure, which turns the rest of the run dense.
        """
        try:
            with pause_malloc_graph():
                backend = self._usable_backend(q)
                order = self._order(layout, q.device)
                watch = Stopwatch(q.device)
                out, stats = psa_attention(
                    q,
                    k,
                    v,
                    layout=layout,
                    config=self.settings.preset.config,
                    scale=scale,
                    backend=backend,
                    order=order,
                    stats=True,
                )
                watch.stop()
                with self._counting:
                    self._pending.append(_PendingCall(self._steps, block, layout.tokens, watch, stats))
                    self._current_step.sparse += 1
        except InterruptProcessingException:
            raise
        except (backends.BackendUnavailable, SelfCheckFailed) as error:
            self._fail(str(error))
        except Exception as error:
            # Whatever a kernel does, the video renders: dense attention takes over.
            self._fail(f"{type(error).__name__}: {error}", error)
        else:
            return out
        self.count_dense(f"because PSA could not run ({self._failure})")
        return None

    def finish(self, outcome: str) -> RunRecord:
        """End the run, let go of its tensors and say what it did.

        Args:
            outcome: ``finished``, ``interrupted`` or ``failed``.
        """
        # After a failure the device may answer nothing any more, not even a number.
        self._close(self._step, readable=outcome != "failed")
        if outcome != "failed":
            self._read_pending()
        self._pending.clear()
        self._orders.clear()
        record = RunRecord(
            title=self.settings.title,
            outcome=outcome,
            seconds=time.perf_counter() - self._began,
            steps=self._steps,
            sparse_steps=self._sparse_steps,
            sparse_calls=self._sparse_calls,
            dense_calls=dict(self._dense_calls),
            other_calls=self._other_calls,
            density=self._mean_density(),
            tokens=self._tokens,
            backend=", ".join(sorted(set(self._backends.values()))) if self._sparse_calls else "",
            unused_cause=self._unused_cause(),
            levels=self.settings.preset.config.levels,
            calls=tuple(self._calls),
        )
        _log.info("PSA %s: %s", record.title, record)
        self._say(str(record))
        return record

    @property
    def _current_step(self) -> _Step:
        assert self._step is not None, "an attention call came before its model call"
        return self._step

    def _window_reason(self, sigma: float) -> str | None:
        schedule = self.settings.preset.schedule
        if sigma > self._sigma_start * (1 + _SIGMA_TOLERANCE):
            return f"before start_percent {schedule.start_percent:g}"
        if sigma <= self._sigma_end * (1 + _SIGMA_TOLERANCE):
            return f"after end_percent {schedule.end_percent:g}"
        return None

    def _usable_backend(self, q: Tensor) -> str:
        key = (q.device, q.dtype, q.shape[-1])
        if key not in self._backends:
            name = self.settings.backend
            if name == "auto":
                if q.device.type != "cuda":
                    raise backends.BackendUnavailable(
                        f"PSA is made for NVIDIA GPUs; on {q.device.type} only the backend 'reference' works, slowly"
                    )
                name = "triton"
            backends.resolve(name, q)
            self_check(*key, name)
            self._backends[key] = name
        return self._backends[key]

    def _order(self, layout: TokenLayout, device: torch.device) -> TokenOrder:
        key = (layout, device)
        if key not in self._orders:
            self._orders[key] = plan_order(layout, self.settings.preset.config, device)
        return self._orders[key]

    def _fail(self, reason: str, error: Exception | None = None) -> None:
        first, *others = reason.strip().splitlines()
        self._failure = " ".join([first, *others[-1:]])  # a compiler says where first, and what last
        # As text: a log handler that keeps records would keep the traceback's tensors as well.
        trace = "\n" + "".join(traceback.format_exception(error)).rstrip() if error else ""
        _log.warning("PSA %s: attention is dense for the rest of this run: %s%s", self.settings.title, reason, trace)

    def _read_pending(self) -> None:
        self._calls += [call.read() for call in self._pending]
        self._pending.clear()

    def _mean_density(self) -> float | None:
        densities = [call.density for call in self._calls if call.density is not None]
        return statistics.fmean(densities) if densities else None

    def _close(self, step: _Step | None, readable: bool = True) -> None:
        if step is None:
            return
        self._steps += 1
        self._dense_calls.update(step.dense)
        state = f"dense, {step.dense.most_common(1)[0][0]}" if step.dense else "no attention call"
        if step.sparse:
            self._sparse_steps += 1
            self._sparse_calls += step.sparse
            state = "sparse"
            if readable:
                # Dense steps before it wait for this one, so that they never wait for the device themselves.
                self._read_pending()
                ratio = speedup(self._calls)
                faster = "" if ratio is None else f", {ratio:.1f}x dense speed"
                state = f"sparse, density so far {self._mean_density():.3f}{faster}"
        text = f"step {self._steps}: {state}"
        if self.settings.verbose:
            counts = f"sigma {step.sigma:.4f}, {step.sparse} sparse and {step.dense.total()} dense calls"
            _log.info("PSA %s: %s (%s)", self.settings.title, text, counts)
        self._say(text)

    def _say(self, text: str) -> None:
        lines = (f"PSA {self.settings.title}", text, self.settings.note)
        self._report("\n".join(filter(None, lines)))

    def _unused_cause(self) -> str:
        if self._sparse_calls or self._dense_calls:
            return ""
        if self._unsupported is not None:
            return self._unsupported
        if not self._tokens:
            return (
                "the model was not called through ComfyUI's diffusion model wrappers; either nothing was sampled, "
                "or another node runs the model in its own way"
            )
        if not self._other_calls:
            return (
                "no attention call came by; another node has probably replaced the model's attention functions, or "
                "this ComfyUI's version of the model does not pass its options on to its blocks (as Wan S2V in 0.3.75)"
            )
        return (
            f"no attention call was the self-attention of the expected {self._tokens} tokens; another node has "
            "probably changed the sequence"
        )
