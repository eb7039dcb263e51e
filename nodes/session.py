"""What one sampling run knows and decides; its tensors die with it, a record of plain numbers remains."""

from __future__ import annotations

import logging
import statistics
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ..psa_core import TokenLayout, TokenOrder, backends, plan_order, psa_attention
from ..psa_core.capability import Reason
from ..psa_core.presets import Preset
from ..psa_core.self_check import SelfCheckFailed, self_check
from .pending_calls import PendingCall, Stopwatch, read_calls
from .run_record import CallRecord, RunRecord, compared_with_dense

try:
    from comfy.model_prefetch import pause_malloc_graph
except ImportError:  # a ComfyUI that does not record allocations
    from contextlib import nullcontext as pause_malloc_graph

if TYPE_CHECKING:
    from .probe import Probe

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
        probe: Compares sparse calls with dense attention; None where nobody asked for it.
    """

    def __init__(
        self,
        settings: PatchSettings,
        percent_to_sigma: Callable[[float], float],
        report: Callable[[str], None],
        probe: Probe | None = None,
    ) -> None:
        schedule = settings.preset.schedule
        self.settings = settings
        self.probe = probe
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
        self._dense_attention = ""
        self._pending: list[PendingCall] = []
        self._calls: list[CallRecord] = []

    def begin_model_call(self, sigma: float, layout: TokenLayout, dense_attention: str = "") -> None:
        """Note that the model is called at a noise level; another level than before begins a step.

        Args:
            sigma: The noise level.
            layout: The call's tokens.
            dense_attention: The other node whose attention answers what stays dense; empty for ComfyUI's own.
        """
        if self.probe is not None:
            self.probe.begin_model_call()
        with self._counting:
            self._dense_attention = dense_attention
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
    def timed_dense(self, q: Tensor, tokens: int, block: int) -> Iterator[None]:
        """Time a video self-attention call that stays dense; q's first dimension is the batch."""
        watch = Stopwatch(q.device)
        yield
        watch.stop()
        with self._counting:
            self._pending.append(PendingCall(self._steps, block, tokens, q.shape[0], watch, None))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        scale: float | None,
        block: int,
        dense: Callable[[], Tensor],
    ) -> Tensor | None:
        """Compute a call sparsely.

        Args:
            q: Queries ``[B, H, N, D]``; k and v likewise.
            block: Where the record of the call belongs.
            dense: Computes the output ``[B, H, N, D]`` as without PSA, for the probe.

        Returns:
            The output in q's memory layout, or None after a failure, which turns the rest of the run dense.
        """
        try:
            with pause_malloc_graph():
                backend = self._usable_backend(q)
                order = self._order(layout, q.device)
                attend = partial(
                    psa_attention, q, k, v, layout=layout, scale=scale, backend=backend, order=order, stats=True
                )
                watch = Stopwatch(q.device)
                out, stats = attend(config=self.settings.preset.config)
                watch.stop()
                with self._counting:
                    self._pending.append(PendingCall(self._steps, block, layout.tokens, q.shape[0], watch, stats))
                    self._current_step.sparse += 1
                if self.probe is not None:
                    self.probe.see(self._steps, block, out, stats, attend, dense)
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
            dense_attention=self._dense_attention,
            other_calls=self._other_calls,
            density=self._mean_density(),
            tokens=self._tokens,
            backend=", ".join(sorted(set(self._backends.values()))) if self._sparse_calls else "",
            unused_cause=self._unused_cause(),
            levels=self.settings.preset.config.levels,
            calls=tuple(self._calls),
        )
        _log.info("PSA %s: %s", record.title, record)
        self._say(*record.summary())
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
                    raise backends.BackendUnavailable(Reason("only_reference", {"device": q.device.type}))
                name = "triton"
            backends.resolve(name, q)
            self_check(*key, name, self.settings.preset.config)
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
        if self.probe is not None:
            self.probe.read()
        self._calls += read_calls(self._pending)
        self._pending.clear()

    def _mean_density(self) -> float | None:
        densities = [call.density for call in self._calls if call.density is not None]
        return statistics.fmean(densities) if densities else None

    def _close(self, step: _Step | None, readable: bool = True) -> None:
        if step is None:
            return
        self._steps += 1
        self._dense_calls.update(step.dense)
        lines = ["no attention call"] if not step.dense else ["dense", step.dense.most_common(1)[0][0]]
        if step.sparse:
            self._sparse_steps += 1
            self._sparse_calls += step.sparse
            lines = ["sparse"]
            if readable:
                # Dense steps before it wait for this one, so that they never wait for the device themselves.
                self._read_pending()
                lines.append(f"density so far {self._mean_density():.2f}")
                if "reference" not in self._backends.values():  # which is not there to be fast
                    lines.append(compared_with_dense(self._calls))
        first, *others = filter(None, lines)
        if self.settings.verbose:
            counts = f"sigma {step.sigma:.4f}, {step.sparse} sparse and {step.dense.total()} dense calls"
            _log.info("PSA %s: step %d: %s (%s)", self.settings.title, self._steps, ", ".join([first, *others]), counts)
        self._say(f"step {self._steps}: {first}", *others)

    def _say(self, *lines: str) -> None:
        self._report("\n".join(filter(None, (f"PSA {self.settings.title}", *lines, self.settings.note))))

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
