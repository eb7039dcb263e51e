"""The inputs that change a preset, which PSA Attention Patch and PSA Preset share: the widgets, and what they mean."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..psa_core.schedule import MAX_TOKENS, BlockList

KEEP = -1
"""Value of a numeric input that leaves the preset's own in place."""


def error_weight_input(whose: str) -> io.WidgetInput:
    """Input ``error_weight``.

    Args:
        whose: Whose value is taken where none is given, such as ``the preset's``.
    """
    return io.Float.Input(
        "error_weight",
        default=KEEP,
        min=KEEP,
        max=1e6,
        step=0.0001,
        round=0.000001,
        optional=True,
        tooltip=(
            "How much error a saving may cost. Larger is faster and further from the picture without the node; 0 "
            f"keeps attention exact; -1 takes {whose} value. Only for presets that select by error, as the bundled "
            "ones do."
        ),
    )


def schedule_inputs(whose: str) -> list[io.WidgetInput]:
    """Inputs ``start_percent``, ``end_percent``, ``dense_blocks`` and ``min_tokens``, in this order.

    Args:
        whose: Whose value is taken where none is given, such as ``the preset's``.
    """
    return [
        io.Float.Input(
            "start_percent",
            default=KEEP,
            min=KEEP,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip=(
                "Attention turns sparse after this share of the sampling, 0 to 1. The first steps decide the "
                f"composition; keeping them dense stays closer to the picture without the node. -1 takes {whose}."
            ),
        ),
        io.Float.Input(
            "end_percent",
            default=KEEP,
            min=KEEP,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip=f"Attention is dense again after this share of the sampling, 0 to 1. -1 takes {whose}.",
        ),
        io.String.Input(
            "dense_blocks",
            default="",
            optional=True,
            tooltip=(
                "Transformer blocks that stay dense, counted from 0: 0, 1, 38-39, -1. Negative numbers count from the "
                f"end, so -1 is the last block. Empty takes {whose}."
            ),
        ),
        io.Int.Input(
            "min_tokens",
            default=KEEP,
            min=KEEP,
            max=MAX_TOKENS,
            optional=True,
            tooltip=(
                "Videos with fewer tokens than this stay dense, because sparse attention would not be faster. A Wan "
                f"token is 16 x 16 pixels of 4 frames (32 x 32 with the Wan 2.2 5B model). -1 takes {whose}."
            ),
        ),
    ]


def given_settings(error_weight: float) -> dict[str, Any]:
    """What a preset file would say of ``error_weight``; nothing where it is left alone."""
    return {} if error_weight == KEEP else {"error_weight": error_weight}


def given_schedule(start_percent: float, end_percent: float, dense_blocks: str, min_tokens: int) -> dict[str, Any]:
    """What a preset file would say of those of the schedule's inputs that are not left alone.

    Raises:
        ValueError: ``dense_blocks`` is no text, or names something else than blocks.
    """
    values: dict[str, Any] = {"start_percent": start_percent, "end_percent": end_percent, "min_tokens": min_tokens}
    given = {name: value for name, value in values.items() if value != KEEP}
    if not isinstance(dense_blocks, str) or dense_blocks.strip():  # a link may bring anything
        given["dense_blocks"] = BlockList.parse(dense_blocks)
    return given
