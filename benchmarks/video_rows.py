"""What the documents' tables say of whole videos and of keys in order of content, likewise."""

from __future__ import annotations

import statistics

import numpy as np

from benchmarks.results_file import Record
from benchmarks.table_rows import H100, NOISES, WAN_14B, Rows, attention, bare, records, steps

MODELS = ("first", "second")
STAGES = ("prepare", "importance", "select")
WAN_14B_STEPS = "wan2.1_14b"  # as steps' records call it
CONTENT_CHOICES = (
    "default",
    "keys in order of content",
    *(
        f"the same, importance from means of {group}, every {stride}th row"
        for group, stride in ((64, 16), (32, 8), (32, 4), (16, 16), (16, 8), (16, 4), (8, 8))
    ),
    "the same, key blocks of 128",
    "the same, key blocks of 32",
)
VIDEO_ROWS = (
    "balanced",
    "balanced_1",
    "quality",
    "quality_1",
    "fast",
    "fast_1",
    "balanced, first block x .3",
)
TUNING_ROWS = (
    "flash",
    "balanced",
    "official_topk",
    "official_balanced",
    "one weight, keys sorted, error_weight 0.0006",
    "half ramp, keys sorted, error_weight 0.0015",
    "ramp, error_weight 0.003",
    "ramp, keys sorted, error_weight 0.003",
    "ramp, keys sorted, 32/8, error_weight 0.003",
    "ramp, keys sorted, 16/8, error_weight 0.003",
    "ramp squared, keys sorted, error_weight 0.006",
    "ramp, keys sorted, first block x .3, error_weight 0.003",
)
SOL_ROWS = (
    "balanced",
    *(f"Sol-Attn{when}, tau {tau}" for when in ("", " after 20 % dense") for tau in ("0.5", "1", "2")),
)


def content_choices() -> Rows:
    found = {(r["choice"], r["noise"]): r for r in records(f"fidelity-32760-{H100}")}
    return [
        [
            choice,
            *(
                f"{bare(r['rel_l2'], 4)} ({bare(r['worst_head'], 3)}), {r['milliseconds']:.1f} ms"
                for r in (found[choice, noise] for noise in NOISES)
            ),
        ]
        for choice in CONTENT_CHOICES
    ]


def videos(file: str, steps: int = 30) -> dict[tuple[str, str], list[Record]]:
    """Records of the long videos, by model and method, one a seed."""
    by_key: dict[tuple[str, str], list[Record]] = {}
    for r in records(f"{file}-{H100}"):
        if (r["tokens"], r["steps"]) == (32760, steps) and "failed" not in r:
            by_key.setdefault((r["model"], r["method"]), []).append(r)
    return by_key


def fidelity_of_videos(found: list[Record] | None) -> str:
    """Mean work and PSNR of some seeds."""
    if not found:
        return ""
    psnr = statistics.fmean(r["psnr_db"] for r in found)
    work = "" if found[0]["work"] is None else f"{bare(statistics.fmean(r['work'] for r in found), 3)}: "
    return f"{work}{psnr:.1f} dB"


def whole_videos() -> Rows:
    by_key = videos("whole-video")
    return [[name, *(fidelity_of_videos(by_key.get((model, name))) for model in MODELS)] for name in VIDEO_ROWS]


def tuning() -> Rows:
    by_key = videos("whole-video-tuning")
    return [[name, *(fidelity_of_videos(by_key.get((model, name))) for model in MODELS)] for name in TUNING_ROWS]


def sol_videos() -> Rows:
    by_key = videos("whole-video-sol-attn")
    return [[name, fidelity_of_videos(by_key["first", name])] for name in SOL_ROWS]


def seconds_of_step(share: float) -> float:
    """Seconds of a step of Wan 14B at 720p with the new presets' settings at a share of the dense attention work.

    On a straight line through the measured steps, and what sorting keys and finer masses took longer in a call, for
    two conditions in each of 40 blocks. A step that is all dense is ComfyUI's default.
    """
    by_key = steps()
    if share == 1:
        return float(by_key[WAN_14B_STEPS, "dense", ""]["seconds_per_step"])
    measured = [r for (model, method, _), r in by_key.items() if (model, method) == (WAN_14B_STEPS, "psa")]
    slope, least = np.polyfit([r["density"] for r in measured], [r["seconds_per_step"] for r in measured], 1)
    call = attention(file="attention-sorted")
    stages = [
        sum(
            call[WAN_14B, "structured", "psa", name]["stages_ms"][stage]
            for stage in ("prepare", "importance", "select")
        )
        for name in ("density 0.15", "density 0.15, keys as they come")
    ]
    return float(least + slope * share + 2 * 40 * (stages[0] - stages[1]) / 1000)


def fifty_steps() -> Rows:
    """Seconds of 50 steps of Wan 14B at 720p, the sum over the steps' shares of the work in the second model."""
    dense = 50 * seconds_of_step(1)
    cudnn = 50 * steps()[WAN_14B_STEPS, "dense cudnn", ""]["seconds_per_step"]
    rows: Rows = [[None, f"{dense:.0f} s", ""], [None, f"{cudnn:.0f} s", f"{dense / cudnn:.1f}x"]]
    for name in ("balanced_1", "quality", "balanced", "fast"):
        found = videos("whole-video")["second", name]
        seconds = statistics.fmean(
            50 * statistics.fmean(seconds_of_step(share) for share in r["work_by_step"]) for r in found
        )
        rows.append([f"`{name}`", f"{seconds:.0f} s", f"{dense / seconds:.1f}x"])
    return rows
