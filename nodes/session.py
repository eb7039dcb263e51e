"""One sampling run: it computes the calls that may be sparse, and whatever goes wrong, the video renders."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ..psa_core import PSAConfig, TokenLayout, TokenOrder, backends, plan_order, psa_attention
from ..psa_core.capability import Reason
from ..psa_core.self_check import SelfCheckFailed, self_check
from .gate import Gate, PatchSettings
from .run_record import RunRecord, compared_with_dense
from .shared_by_copies import PartOfARun
from .tally import Step, Stopwatch, Tally
from .words import Report, Unfailing, Words, sendable

try:
    from comfy.model_prefetch import pause_malloc_graph
except ImportError:  # a ComfyUI that does not record allocations
    from contextlib import nullcontext as pause_malloc_graph

if TYPE_CHECKING:
    from .probe import Attend, Probe

_log = logging.getLogger(__name__)


class Session(PartOfARun):
    """One sampling run of a patched model. Its tensors die with it, a record of plain numbers remains.

    Args:
        settings: What the patch node was asked for.
        percent_to_sigma: The running model's own; a node after the patch may have changed it.
        report: Shows sentences to the user.
        probe: Compares sparse calls with dense attention; None where nobody asked for it.
    """

    def __init__(
        self,
        settings: PatchSettings,
        percent_to_sigma: Callable[[float], float],
        report: Report,
        probe: Probe | None = None,
    ) -> None:
        self.settings = settings
        self.probe = probe
        self._gate = Gate(settings, percent_to_sigma)
        self._tally = Tally()
        self._report = Unfailing(report)
        self._orders: dict[tuple[TokenLayout, torch.device], TokenOrder] = {}
        self._backends: dict[tuple[torch.device, torch.dtype, int], str] = {}
        self._failure: Words | None = None
        self._unsupported: Words | None = None

    @property
    def needs_blocks(self) -> bool:
        """Whether it matters which transformer block a call is in."""
        weighted = bool(self.settings.preset.schedule.block_weights)
        return weighted or bool(self.settings.dense_blocks) or self.probe is not None

    def begin_model_call(self, sigma: float, layout: TokenLayout, dense_attention: str = "") -> None:
        """Note that the model is called at a noise level; another level than before begins a step.

        Args:
            sigma: The noise level.
            layout: The call's tokens.
            dense_attention: The other node whose attention answers what stays dense; empty for ComfyUI's own.
        """
        if self.probe is not None:
            self.probe.begin_model_call()
        if ended := self._tally.begin_model_call(sigma, layout.tokens, dense_attention):
            self._tell(ended, readable=True)

    def refuse_model(self, reason: Words) -> None:
        """Note that the model called is none that PSA knows."""
        self._unsupported = reason

    def count_other(self) -> None:
        """Count an attention call that is not the video's self-attention."""
        self._tally.count_other()

    def count_dense(self, reason: Words) -> None:
        """Count a video self-attention call that stays dense."""
        self._tally.count_dense(reason)

    def admit(self, layout: TokenLayout, block: int | None) -> PSAConfig | Words:
        """The settings of a video self-attention call, or why it stays dense.

        Args:
            layout: The call's tokens.
            block: Number of the transformer block that it is in, if known.
        """
        if self._failure is not None:
            return Words.of("could_not_run", failure=self._failure)
        return self._gate.admit(self._tally.step.sigma, layout.tokens, block)

    @contextmanager
    def timed_dense(self, q: Tensor, tokens: int, block: int) -> Iterator[None]:
        """Time a video self-attention call that stays dense; q's first dimension is the batch."""
        watch = Stopwatch(q.device)
        yield
        watch.stop()
        self._tally.add(block, tokens, q.shape[0], watch, None, None)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        config: PSAConfig,
        scale: float | None,
        block: int,
        dense: Callable[[], Tensor],
    ) -> Tensor | None:
        """Compute a call sparsely.

        Args:
            q: Queries ``[B, H, N, D]``; k and v likewise.
            config: What ``admit`` said.
            block: Where the record of the call belongs.
            dense: Computes the output ``[B, H, N, D]`` as without PSA, for the probe.

        Returns:
            The output in q's memory layout, or None after a failure, which turns the rest of the run dense.
        """
        with self._dense_from_here_on_failure(), pause_malloc_graph():
            backend = self._usable_backend(q)
            order = self._order(layout, q.device)
            attend = partial(
                cast("Attend", psa_attention),
                q,
                k,
                v,
                layout=layout,
                scale=scale,
                backend=backend,
                order=order,
                stats=True,
            )
            watch = Stopwatch(q.device)
            out, stats = attend(config=config)
            watch.stop()
            self._tally.add(block, layout.tokens, q.shape[0], watch, stats, config.error_weight)
            if (probe := self.probe) is not None:
                # Its weights are the preset's, which vary from call to call as the run's own does.
                weighted = partial(self._gate.weighted, sigma=self._tally.step.sigma, block=block)
                probe.see(
                    self._tally.step.number, block, out, stats, lambda config: attend(config=weighted(config)), dense
                )
            return out
        self.count_dense(Words.of("could_not_run", failure=self._failure))
        return None

    def finish(self, outcome: str) -> RunRecord:
        """End the run, let go of its tensors and say what it did.

        Args:
            outcome: ``finished``, ``interrupted`` or ``failed``.
        """
        # After a failure the device may answer nothing any more, not even a number.
        readable = outcome != "failed"
        if last := self._tally.end():
            self._tell(last, readable)
        if readable:
            self._read()
        self._tally.forget()
        self._orders.clear()
        record = self._tally.record(
            self.settings.title,
            outcome,
            set(self._backends.values()),
            self.settings.preset.config.levels,
            self._unsupported,
        )
        _log.info("%s: %s", self._title, record)
        self._say(*record.summary())
        return record

    @property
    def _title(self) -> Words:
        return Words.of("title", title=self.settings.title)

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

    @contextmanager
    def _dense_from_here_on_failure(self) -> Iterator[None]:
        """What goes wrong inside, but for the user's interrupt, is said once and turns the rest of the run dense."""
        try:
            yield
        except InterruptProcessingException:
            raise
        except backends.BackendUnavailable as error:
            self._failure = Words.of_error(error)
            self._warn(str(self._failure))
        except SelfCheckFailed as error:
            self._failure = Words.of("self_check", english=Words.of_error(error))
            self._warn(str(self._failure))
        except Exception as error:
            self._failure = Words.of_exception(error)
            # As text: a log handler that keeps records would keep the traceback's tensors as well.
            trace = "".join(traceback.format_exception(error)).rstrip()
            self._warn(f"{self._failure}\n{trace}")

    def _warn(self, text: str) -> None:
        _log.warning("%s: attention is dense for the rest of this run: %s", self._title, sendable(text))

    def _read(self) -> None:
        with self._dense_from_here_on_failure():
            if self.probe is not None:
                self.probe.read()
            self._tally.read()

    def _tell(self, step: Step, readable: bool) -> None:
        number = step.number + 1
        lines: list[Words] = []
        if step.sparse:
            lines.append(Words.of("step_sparse", step=number))
            if readable:
                # Dense steps before it wait for this one, so that they never wait for the device themselves.
                self._read()
                if (density := self._tally.density) is not None:
                    lines.append(Words.of("density_so_far", density=density))
                if "reference" not in self._backends.values():  # which is not there to be fast
                    lines += compared_with_dense(self._tally.calls)
        elif step.dense:
            lines += [Words.of("step_dense", step=number), step.dense.most_common(1)[0][0]]
        else:
            lines.append(Words.of("step_without_call", step=number))
        if self.settings.verbose:
            counts = f"sigma {step.sigma:.4f}, {step.sparse} sparse and {step.dense.total()} dense calls"
            _log.info("%s: %s (%s)", self._title, ", ".join(map(str, lines)), counts)
        self._say(*lines)

    def _say(self, *lines: Words) -> None:
        self._report((self._title, *lines, *self.settings.notes))
