"""Whether a call may be sparse, and with which settings: what the user asked for, at this point of the sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..psa_core import PSAConfig
from ..psa_core.config import MAX_ERROR_WEIGHT
from ..psa_core.presets import Preset
from ..psa_core.schedule import Stacks, percent_at
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
        stacks: Name and size of the model's stacks of transformer blocks; none where PSA does not know the model.
    """

    title: str
    notes: tuple[Words, ...]
    preset: Preset
    dense_blocks: frozenset[int]
    backend: str
    verbose: bool
    stacks: Stacks = ()


class Gate:
    """Decides about the calls of one run.

    Args:
        settings: What the patch node was asked for.
        percent_to_sigma: The running model's own; a node after the patch may have changed it.
    """

    def __init__(self, settings: PatchSettings, percent_to_sigma: Callable[[float], float]) -> None:
        schedule = settings.preset.schedule
        self._settings = settings
        self._percent_to_sigma = percent_to_sigma
        self._percents: dict[float, float] = {}
        self._weighted: dict[tuple[PSAConfig, float], PSAConfig] = {}
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
        if (dense_blocks or preset.schedule.block_weights) and block is None:
            return Words.of("unnamed_block")
        if block in dense_blocks:
            return Words.of("dense_block")
        return self.weighted(preset.config, sigma, block)

    def weighted(self, config: PSAConfig, sigma: float, block: int | None) -> PSAConfig:
        """A config with the error weight of a noise level and a block; of one weight there is one object.

        Args:
            config: Its ``error_weight`` is the one that ``ramp`` and ``block_weights`` multiply.
            sigma: Noise level of the step.
            block: Number of the transformer block; may be unknown where no block has a weight of its own.
        """
        schedule, weight = self._settings.preset.schedule, config.error_weight
        if weight is None or not schedule.varies:
            return config
        if sigma not in self._percents:
            self._percents[sigma] = percent_at(sigma, self._percent_to_sigma)
        factor = schedule.weight_at(self._percents[sigma], block, self._settings.stacks)
        key = config, min(weight * factor, MAX_ERROR_WEIGHT)
        return self._weighted.setdefault(key, replace(config, error_weight=key[1]))

    def _window_reason(self, sigma: float) -> Words | None:
        schedule = self._settings.preset.schedule
        if sigma > self._sigma_start * (1 + _SIGMA_TOLERANCE):
            return Words.of("before_start", percent=schedule.start_percent)
        if sigma <= self._sigma_end * (1 + _SIGMA_TOLERANCE):
            return Words.of("after_end", percent=schedule.end_percent)
        return None
