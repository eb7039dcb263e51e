"""Whether a call may be sparse, and with which settings: what the user asked for, at this point of the sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..psa_core import PSAConfig
from ..psa_core.presets import Preset
from .words import Words

# A scheduler's sigma may lie a rounding error above the one that percent_to_sigma gives for the same step.
_SIGMA_TOLERANCE = 1e-6


@dataclass(frozen=True)
class PatchSettings:
    """What the patch node was asked for.

    Args:
        title: The preset, for messages.
        notes: What the user should know about the choice of preset.
        preset: The preset, with the node's own values in place.
        dense_blocks: Numbers of the transformer blocks that stay dense.
        backend: ``auto``, ``triton`` or ``reference``.
        verbose: Log every step.
    """

    title: str
    notes: tuple[Words, ...]
    preset: Preset
    dense_blocks: frozenset[int]
    backend: str
    verbose: bool


class Gate:
    """Decides about the calls of one run.

    Args:
        settings: What the patch node was asked for.
        percent_to_sigma: The running model's own; a node after the patch may have changed it.
    """

    def __init__(self, settings: PatchSettings, percent_to_sigma: Callable[[float], float]) -> None:
        schedule = settings.preset.schedule
        self._settings = settings
        self._sigma_start = float(percent_to_sigma(schedule.start_percent))
        self._sigma_end = float(percent_to_sigma(schedule.end_percent))

    def admit(self, sigma: float, tokens: int, block: int | None) -> PSAConfig | Words:
        """The settings of a video self-attention call, or why it stays dense.

        Args:
            sigma: Noise level of the step.
            tokens: Length of the sequence.
            block: Number of the transformer block, if known.
        """
        preset, dense_blocks = self._settings.preset, self._settings.dense_blocks
        if (reason := self._window_reason(sigma)) is not None:
            return reason
        if tokens < preset.schedule.min_tokens:
            return Words.of("short", tokens=preset.schedule.min_tokens)
        if dense_blocks and block is None:
            return Words.of("unnamed_block")
        if block in dense_blocks:
            return Words.of("dense_block")
        return preset.config

    def _window_reason(self, sigma: float) -> Words | None:
        schedule = self._settings.preset.schedule
        if sigma > self._sigma_start * (1 + _SIGMA_TOLERANCE):
            return Words.of("before_start", percent=schedule.start_percent)
        if sigma <= self._sigma_end * (1 + _SIGMA_TOLERANCE):
            return Words.of("after_end", percent=schedule.end_percent)
        return None
