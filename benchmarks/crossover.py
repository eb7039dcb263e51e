"""From how many tokens on sparse attention beats dense: ``python benchmarks/crossover.py``.

For every model family with presets, on synthetic input (``structured``), bf16: with the settings of one of its presets,
which are what a user gets, and at one density for comparison. At few tokens a preset's error_weight does much more work
than at many, so the two differ. Dense is what PyTorch takes.

Writes ``crossover-<device>.json``: ``{device, versions, commit, preset, density, records}``. A record of a length holds
``{family, heads, head_dim, method, tokens, dense_ms, sparse_ms, density}``, where ``method`` is ``preset`` or
``density``; what follows from them is in records of ``tokens`` 0: ``{family, heads, head_dim, method, crossover,
min_tokens}``. ``crossover`` is null where sparse did not pay at any length measured; ``min_tokens`` is what to set for
the family: the crossover in thousands, rounded up, as a model's other layers may gain less than this input.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.results_file import (  # noqa: E402
    RESULTS,
    Record,
    ResultFile,
    checked_out_commit,
    describe_machine,
    device_slug,
)
from psa_core.bench import Timing, Video, config_of_density, crossover, describe_crossover  # noqa: E402
from psa_core.presets import load_presets  # noqa: E402

FRAMES = (2, 3, 4, 5, 6, 8, 10, 13)
KEY = ("family", "method", "tokens")


@dataclass(frozen=True)
class Family:
    """A model family's attention.

    Args:
        heads: Number of heads.
        head_dim: Their size.
        frame: Tokens of a frame, at the resolution that it is made for.
    """

    heads: int
    head_dim: int
    frame: tuple[int, int]


FAMILIES = {
    "wan2.1_1.3b": Family(12, 128, (30, 52)),
    "wan2.1_14b": Family(40, 128, (30, 52)),
    "wan2.2_a14b": Family(40, 128, (30, 52)),
    "wan2.2_5b": Family(24, 128, (22, 40)),
    "cogvideox_5b": Family(48, 64, (30, 45)),
    "cogvideox1.5_5b": Family(48, 64, (48, 85)),
}


def main() -> None:
    args = parse_arguments()
    machine = describe_machine(args.commit) | {"preset": args.preset, "density": args.density}
    results = ResultFile.open(args.out / f"crossover-{device_slug()}.json", machine, KEY)
    for name, family in FAMILIES.items():
        measured = measure_family(name, family, args.preset, args.density, args.frames)
        for method, timings in measured.items():
            for record in records_of(name, family, method, timings):
                results.add(record)
            print(f"{name}, {method}: {describe_crossover(timings)}", flush=True)
    print(f"wrote {results.path}")


def measure_family(
    name: str, family: Family, preset: str, density: float, frames: tuple[int, ...]
) -> dict[str, list[Timing]]:
    """Timings at every length, by method. Twins of a family that was measured are measured again: it takes seconds."""
    config = load_presets(ROOT / "presets" / f"{name}.yaml")[preset].config
    measured: dict[str, list[Timing]] = {"preset": [], "density": []}
    for length in frames:
        video = Video.structured((length, *family.frame), family.heads, family.head_dim, torch.bfloat16)
        dense_ms = video.dense_ms()
        measured["preset"].append(video.time(config, dense_ms))
        measured["density"].append(video.time(config_of_density(video.density_of, density), dense_ms))
    return measured


def records_of(name: str, family: Family, method: str, timings: list[Timing]) -> list[Record]:
    """A record of every length, and one of what follows."""
    common = {"family": name, "heads": family.heads, "head_dim": family.head_dim, "method": method}
    lengths = [
        {"tokens": t.tokens, "dense_ms": t.dense_ms, "sparse_ms": t.sparse_ms, "density": t.density} for t in timings
    ]
    tokens = crossover(timings)
    least = None if tokens is None else -(-tokens // 1000) * 1000
    return [common | record for record in (*lengths, {"tokens": 0, "crossover": tokens, "min_tokens": least})]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="balanced", help="whose settings to measure, of every family")
    parser.add_argument("--density", type=float, default=0.15, help="share of the dense work to do, for comparison")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES, help="lengths, in latent frames")
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    return args


if __name__ == "__main__":
    main()
