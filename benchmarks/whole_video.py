"""Whole videos of small models, rendered with every way to attend and compared with dense attention at equal seeds.

    python benchmarks/whole_video.py --models first=demo/weights second=trained --seconds 330 --resume

Writes ``whole-video-<device>.json``: ``{device, versions, commit, records}``. A record is one video:

    model, blocks, heads, checkpoint, grid, tokens, steps, cfg       what is rendered
    seed, seeds, subject                                             seeds: whether it is for tuning or for testing
    family, method, settings                                         how it attends (benchmarks/video_methods.py)
    work        mean share of the dense work over all self-attention calls, a dense call counting 1
    work_by_step  likewise over the calls of each step
    psnr_db     of the decoded video against dense, over all frames (null: the same video)
    ssim        likewise, mean of the frames
    seconds     of the sampling, without the decoder

``dense`` is cuDNN's kernel on CUDA; ``flash``, another dense one, shows how far rounding alone drives videos apart.
Where time is short, rows come in the order of their file, each for all models and seeds of a case, case by case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.metrics import mean_squared_error, structural_similarity
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.results_file import RESULTS, Record, ResultFile, checked_out_commit, describe_machine, device_slug  # noqa: E402
from benchmarks.small_models import Grid, SmallModel  # noqa: E402
from benchmarks.video_methods import DenseAttention, Row, RowAttention, read_rows  # noqa: E402
from psa_core import TokenLayout  # noqa: E402

ROWS = ROOT / "benchmarks" / "whole_video_rows.json"
CASES = ("21x30x52:30", "21x30x52:4", "13x16x24:30", "21x30x52:50", "13x16x24:4", "13x16x24:50")
# Five each, so that a model's five subjects are all shown once; the first three are the natural ones.
SEEDS = {"tuning": (0, 1, 2, 3, 4), "test": (5, 6, 7, 8, 9)}
KEY = ("model", "tokens", "steps", "cfg", "seed", "method")
DENSE = "dense"

Frames = Any  # [frames, height, width, 3], fp32, 0 to 1


@dataclass(frozen=True)
class Case:
    """What is rendered: tokens along time, height and width, and sampling steps."""

    grid: Grid
    steps: int

    @staticmethod
    def parse(text: str) -> Case:
        """Read ``TxHxW:steps``."""
        try:
            size, steps = text.split(":")
            frames, height, width = map(int, size.split("x"))
            case = Case((frames, height, width), int(steps))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not TxHxW:steps, such as {CASES[0]}") from None
        if min(*case.grid, case.steps) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
        return case

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Rendering:
    """A decoded video, the seconds that its sampling took, and its share of the dense work where that is known."""

    frames: Frames
    seconds: float
    work: float | None
    work_by_step: list[float] | None


@dataclass
class Studio:
    """Renders videos; keeps dense ones, and which kernels have been compiled.

    Args:
        device: Where the models are.
        cfg: Guidance; other than 1 makes a batch of two.
    """

    device: torch.device
    cfg: float
    dense: dict[tuple[str, Case, int], Rendering] = field(default_factory=dict)
    warm: set[tuple[Any, ...]] = field(default_factory=set)

    def reference(self, model: SmallModel, case: Case, seed: int) -> Rendering:
        """The dense video of a seed, rendered once."""
        key = (model.name, case, seed)
        if key not in self.dense:
            self.dense[key] = self.render(model, case, seed, None)
        return self.dense[key]

    def render(self, model: SmallModel, case: Case, seed: int, row: Row | None) -> Rendering:
        """A seed's video as a row attends, or dense without one."""
        subject, noise = subject_of(model, seed), model.noise(case.grid, seed)
        self._warm_up(model, case, noise, subject, row)
        attend = self._attention(model, case, row)
        self._synchronise()
        begin = time.perf_counter()
        latent = model.sample(noise, subject, case.steps, self.cfg, attend)
        self._synchronise()
        seconds = time.perf_counter() - begin
        return Rendering(model.decode(latent), seconds, attend.work(), attend.work_by_step())

    def _attention(self, model: SmallModel, case: Case, row: Row | None) -> DenseAttention | RowAttention:
        if row is None:
            return DenseAttention(self.device)
        return RowAttention(row, TokenLayout(case.grid), model.blocks, self.device)

    def _warm_up(self, model: SmallModel, case: Case, noise: Tensor, subject: str, row: Row | None) -> None:
        """One call before the clock runs, where kernels have not been compiled or loaded for such a row yet."""
        kind = (model.name, case.grid, row and (row.family, row.method))
        if kind in self.warm:
            return
        self.warm.add(kind)
        attend = self._attention(model, case, row)
        for percent in (0.0, 0.5):
            attend.percent = percent
            model.velocity(noise, 1.0, model.text(subject, self.cfg), self.cfg, attend)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = args.out / f"whole-video-{device_slug()}.json"
    results = ResultFile.open(path, describe_machine(args.commit), KEY)
    models = [SmallModel.load(name, folder, device) for name, folder in args.models.items()]
    rows: list[Row] = []
    for row in read_rows(args.rows):
        if isinstance(row, Row):
            rows.append(row)
        else:
            print(f"left out: {row[0]} ({row[1]})", flush=True)
    print_work(models, args.cases)
    seeds = SEEDS[args.seeds][: args.videos]
    plan = list(plan_videos(args.cases, rows, models, seeds))
    studio, last = Studio(device, args.cfg), 0.0
    for index, (case, row, model, seed) in enumerate(plan):
        about = describe_video(model, case, args.cfg, seed, args.seeds) | describe_row(row)
        if args.resume and is_there(results, about):
            continue
        if args.seconds is not None and time.monotonic() - begin + last > args.seconds:
            print(f"{len(plan) - index} of {len(plan)} videos are left for another call with --resume", flush=True)
            break
        started = time.monotonic()
        record = about | measure(studio, model, case, seed, row, results, args)
        results.add(record)
        last = time.monotonic() - started
        shown = f"{model.name} {case.tokens}:{case.steps} seed {seed}  {about['method']:<48}"
        print(f"{index + 1}/{len(plan)} {started - begin:4.0f} s  {shown} {show(record)}", flush=True)


def measure(
    studio: Studio, model: SmallModel, case: Case, seed: int, row: Row | None, results: ResultFile, args: Any
) -> Record:
    """What came out of one video, or why nothing did; notes the dense one if it had to be rendered first."""
    known = (model.name, case, seed) in studio.dense
    dense = studio.reference(model, case, seed)
    if row is None:
        return compare(dense, dense)
    if not known:
        about = describe_video(model, case, args.cfg, seed, args.seeds) | describe_row(None)
        results.add(about | compare(dense, dense))
    try:
        return compare(dense, studio.render(model, case, seed, row))
    except Exception as error:  # a row that fails is a result too, and must not end a run on a borrowed GPU
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def compare(dense: Rendering, other: Rendering) -> Record:
    """The figures of a record."""
    psnr, ssim = likeness(dense.frames, other.frames)
    return {
        "work": other.work,
        "work_by_step": other.work_by_step and [round(share, 4) for share in other.work_by_step],
        "psnr_db": None if math.isinf(psnr) else psnr,
        "ssim": ssim,
        "seconds": other.seconds,
    }


def likeness(a: Frames, b: Frames) -> tuple[float, float]:
    """PSNR in dB over all frames of two videos, infinite for the same one, and the mean of their SSIM."""

    def of_frame(pair: tuple[Any, Any]) -> tuple[float, float]:
        similarity = structural_similarity(*pair, channel_axis=-1, data_range=1.0)
        return float(mean_squared_error(*pair)), float(similarity)

    with ThreadPoolExecutor() as pool:
        figures = np.array(list(pool.map(of_frame, zip(a, b, strict=True))))
    difference, similarity = figures.mean(axis=0)
    return (-10 * math.log10(difference) if difference else math.inf), float(similarity)


def plan_videos(
    cases: list[Case], rows: list[Row], models: list[SmallModel], seeds: tuple[int, ...]
) -> Iterator[tuple[Case, Row | None, SmallModel, int]]:
    """Everything to be rendered, the most important first; None is dense."""
    for case in cases:
        everything: list[Row | None] = [None, *rows]
        for row, model, seed in itertools.product(everything, models, seeds):
            yield case, row, model, seed


def describe_video(model: SmallModel, case: Case, cfg: float, seed: int, seeds: str) -> Record:
    """The entries of a record that say what is rendered."""
    return {
        "model": model.name,
        "blocks": model.blocks,
        "heads": model.heads,
        "checkpoint": model.checkpoint,
        "grid": list(case.grid),
        "tokens": case.tokens,
        "steps": case.steps,
        "cfg": cfg,
        "seed": seed,
        "seeds": seeds,
        "subject": subject_of(model, seed),
    }


def describe_row(row: Row | None) -> Record:
    """The entries of a record that say how it attends."""
    if row is None:
        return {"family": DENSE, "method": DENSE, "settings": {}}
    return {"family": row.family, "method": row.name, "settings": dict(row.settings)}


def subject_of(model: SmallModel, seed: int) -> str:
    """What a seed shows: the subjects take turns."""
    return model.subjects[seed % len(model.subjects)]


def is_there(results: ResultFile, about: Record) -> bool:
    """Whether a video of the same model and settings has been measured."""
    return any(
        "failed" not in record and all(record.get(name) == value for name, value in about.items())
        for record in results.records
    )


def print_work(models: list[SmallModel], cases: list[Case]) -> None:
    """What a dense video of each case takes."""
    for case, model in itertools.product(cases, models):
        attention, others = (case.steps * f(case.grid) / 1e12 for f in (model.attention_flops, model.other_flops))
        print(
            f"{model.name}, {case.tokens} tokens, {case.steps} steps: attention {attention:.3g} TFLOP, "
            f"linear layers {others:.3g}",
            flush=True,
        )


def show(record: Record) -> str:
    if "failed" in record:
        return f"failed: {record['failed']}"
    work = "   ?" if record["work"] is None else f"{record['work']:.3f}"
    psnr = "  same" if record["psnr_db"] is None else f"{record['psnr_db']:6.2f}"
    return f"work {work}  PSNR {psnr} dB  SSIM {record['ssim']:.4f}  {record['seconds']:.2f} s"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["first=demo/weights"],
        metavar="NAME=FOLDER",
        help="what demo/train.py wrote; first=demo/weights is the demo's",
    )
    parser.add_argument("--cases", nargs="+", type=Case.parse, default=list(map(Case.parse, CASES)), metavar="TxHxW:N")
    parser.add_argument("--rows", type=_rows, default=str(ROWS), help="JSON: a file of rows, or the list itself")
    parser.add_argument("--seeds", choices=SEEDS, default="tuning", help="never choose settings by the test seeds")
    parser.add_argument("--videos", type=int, choices=range(1, 6), default=3, help="seeds of each case")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance; the demo's workflow has none, 1")
    parser.add_argument("--seconds", type=float, help="begin no video that would end later")
    parser.add_argument("--resume", action="store_true", help="leave out what the results' file holds")
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if not all("=" in text for text in args.models):
        parser.error(f"--models: {' '.join(args.models)} is not NAME=FOLDER ...")
    args.models = {name: Path(folder) for name, folder in (text.split("=", 1) for text in args.models)}
    return args


def _rows(text: str) -> list[dict[str, Any]]:
    """Rows from a file or a text, checked before anything is rendered."""
    try:
        rows = json.loads(text if text.lstrip().startswith("[") else Path(text).read_text(encoding="utf-8"))
        for _ in read_rows(rows):
            pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]}: {error}") from error
    return rows


if __name__ == "__main__":
    main()
