"""From errors that were measured to the settings for a wanted error."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .probe import ProbedCall
from .words import plain

STANDS_OUT = 2.0
"""A block stays dense if its error is more than this many times both the wanted one and that of the median block."""

_LEAST_ERROR = 1e-9  # keeps logarithms finite where a call was exact


@dataclass(frozen=True)
class Suggestion:
    """Settings for a wanted error.

    Args:
        error_weight: The weight, three digits of it; None where the preset does not select by error.
        dense_blocks: Blocks that stand out, ascending.
        error: Error to be expected of the blocks that stay sparse.
        density: Share of dense work that these do, likewise.
        out_of_reach: The wanted error is ``below`` or ``above`` all that were measured, and the weight is the nearest.
    """

    error_weight: float | None
    dense_blocks: tuple[int, ...]
    error: float
    density: float
    out_of_reach: Literal["", "below", "above"] = ""


@dataclass(frozen=True)
class Curve:
    """Mean error and density of calls at each error weight that was tried, ascending; one without a weight for a preset
    that does not select by error."""

    weights: tuple[float | None, ...]
    errors: NDArray[np.float64]
    densities: NDArray[np.float64]

    @classmethod
    def of(cls, calls: Sequence[ProbedCall], weights: tuple[float | None, ...]) -> Curve:
        errors, densities = ([getattr(call, name) for call in calls] for name in ("errors", "densities"))
        return cls(weights, np.mean(errors, axis=0), np.mean(densities, axis=0))

    def weight_for(self, wanted: float) -> float | None:
        """Weight at which the error is the wanted one, in three digits, on straight lines between logarithms; the
        nearest one tried where no weight gave such an error."""
        if None in self.weights:
            return None
        # More weight is never less error; where it was measured so, by chance, the line is flat.
        rising = np.maximum.accumulate(np.maximum(self.errors, _LEAST_ERROR))
        return float(plain(np.exp(np.interp(np.log(wanted), np.log(rising), np.log(self.weights)))))  # type: ignore[arg-type]

    def at(self, weight: float | None) -> tuple[float, float]:
        """Error and density at a weight, likewise."""
        if weight is None:
            return float(self.errors[0]), float(self.densities[0])
        place = np.log(weight), np.log(self.weights)  # type: ignore[arg-type]
        errors = np.log(np.maximum(self.errors, _LEAST_ERROR))
        return float(np.exp(np.interp(*place, errors))), float(np.interp(*place, self.densities))


def suggest(calls: Sequence[ProbedCall], weights: tuple[float | None, ...], wanted: float) -> Suggestion:
    """Find the weight for a wanted mean error, and the blocks that are better left dense.

    Args:
        calls: What was measured; at least one call.
        weights: Error weight of each of a call's errors, ascending; one None for a preset that does not select by
            error.
        wanted: Relative L2 error of attention.
    """
    weight = Curve.of(calls, weights).weight_for(wanted)
    errors = {block: Curve.of(own, weights).at(weight)[0] for block, own in by_block(calls).items()}
    limit = STANDS_OUT * max(wanted, statistics.median(errors.values()))
    dense = tuple(block for block, error in errors.items() if error > limit)
    # Without the blocks that stand out, the others can do with more.
    curve = Curve.of([call for call in calls if call.block not in dense], weights)
    weight = curve.weight_for(wanted)
    out_of_reach: Literal["", "below", "above"] = ""
    if weight is not None and not curve.errors[0] <= wanted <= curve.errors.max():
        out_of_reach = "below" if wanted < curve.errors[0] else "above"
    return Suggestion(weight, dense, *curve.at(weight), out_of_reach)


def by_block(calls: Sequence[ProbedCall]) -> dict[int, list[ProbedCall]]:
    """The calls of each block, blocks ascending."""
    blocks: dict[int, list[ProbedCall]] = {}
    for call in sorted(calls, key=lambda call: call.block):
        blocks.setdefault(call.block, []).append(call)
    return blocks
