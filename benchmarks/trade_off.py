"""What a way to attend costs at a given likeness, and what likeness it gives at a given cost, read off its curve.

    python benchmarks/trade_off.py benchmarks/results/whole-video-nvidia-h100-80gb-hbm3.json --against balanced_1

A family of rows (benchmarks/video_methods.py) is a curve of PSNR against work, each point the mean over all seeds that
every row of its case was rendered with. Between two points the PSNR goes in proportion to the logarithm of the work;
beyond the last ones nothing is said.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One row's means over the seeds; work is None where the method does not tell it."""

    family: str
    method: str
    work: float | None
    psnr: float
    ssim: float
    seconds: float
    videos: int


def cases_of(records: Iterable[Record], seeds: str) -> dict[tuple[str, int, int], list[Record]]:
    """Records of the tuning or the test seeds by model, tokens and steps, without what failed."""
    cases: dict[tuple[str, int, int], list[Record]] = defaultdict(list)
    for record in records:
        if "failed" not in record and record["seeds"] == seeds:
            cases[record["model"], record["tokens"], record["steps"]].append(record)
    return dict(cases)


def points_of(records: list[Record]) -> list[Point]:
    """Means of one case's rows, in the order in which they come; dense is the same video and no point.

    A row that lacks a seed is left out, since seeds differ by more than rows do.
    """
    rows: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        if record["psnr_db"] is not None:
            rows[record["method"]][record["seed"]] = record
    seeds = {seed for row in rows.values() for seed in row}
    points = []
    for method, row in rows.items():
        if set(row) != seeds:
            print(f"left out: {method} has {len(row)} of {len(seeds)} seeds", flush=True)
            continue
        works = [record["work"] for record in row.values()]
        points.append(
            Point(
                family=next(iter(row.values()))["family"],
                method=method,
                work=None if None in works else fmean(works),
                psnr=fmean(record["psnr_db"] for record in row.values()),
                ssim=fmean(record["ssim"] for record in row.values()),
                seconds=fmean(record["seconds"] for record in row.values()),
                videos=len(row),
            )
        )
    return points


def curve(points: Iterable[Point], family: str) -> list[tuple[float, float]]:
    """Work and PSNR of a family's points, from little work to much; what more work does not improve is left out."""
    known = sorted((p.work, p.psnr) for p in points if p.family == family and p.work is not None)
    rising: list[tuple[float, float]] = []
    for work, psnr in known:
        if not rising or (psnr > rising[-1][1] and work > rising[-1][0]):
            rising.append((work, psnr))
    return rising


def work_at(rising: list[tuple[float, float]], psnr: float) -> float | None:
    """Work at which a curve reaches a PSNR in dB; None outside the curve."""
    for (low, worse), (high, better) in pairwise(rising):
        if worse <= psnr <= better:
            return math.exp(_between(psnr, worse, better, math.log(low), math.log(high)))
    return None


def psnr_at(rising: list[tuple[float, float]], work: float) -> float | None:
    """PSNR in dB of a curve at a share of the dense work; None outside the curve."""
    for (low, worse), (high, better) in pairwise(rising):
        if low <= work <= high:
            return _between(math.log(work), math.log(low), math.log(high), worse, better)
    return None


def _between(x: float, low: float, high: float, at_low: float, at_high: float) -> float:
    return at_low + (at_high - at_low) * (x - low) / (high - low)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--against", default="balanced_1", help="the method whose PSNR and work the curves are read at")
    parser.add_argument("--seeds", choices=("tuning", "test"), default="tuning")
    args = parser.parse_args(arguments)
    records = json.loads(args.results.read_text(encoding="utf-8"))["records"]
    for (model, tokens, steps), case in cases_of(records, args.seeds).items():
        points = points_of(case)
        print(f"\n{model}, {tokens} tokens, {steps} steps, {points[0].videos if points else 0} {args.seeds} seeds")
        for point in points:
            work = "    ?" if point.work is None else f"{point.work:5.3f}"
            print(
                f"  {point.method:<52} work {work}  {point.psnr:6.2f} dB  SSIM {point.ssim:.4f}  {point.seconds:6.2f} s"
            )
        base = next((p for p in points if p.method == args.against and p.work is not None), None)
        if base is None or base.work is None:
            print(f"  no {args.against} to compare with")
            continue
        for family in dict.fromkeys(point.family for point in points):
            rising = curve(points, family)
            if len(rising) < 2:
                continue
            work, psnr = work_at(rising, base.psnr), psnr_at(rising, base.work)
            same_psnr = "outside the curve" if work is None else f"{work:.3f}, {work / base.work:.2f} of it"
            same_work = "outside the curve" if psnr is None else f"{psnr:.2f} dB, {psnr - base.psnr:+.2f}"
            print(f"  {family:<40} work at its PSNR: {same_psnr:<24} PSNR at its work: {same_work}")


if __name__ == "__main__":
    main()
