"""From how many tokens on sparse attention beats dense: ``python benchmarks/crossover.py``.

Writes ``crossover-<device>.json``:
``{device, versions, commit, density, records: [{head_dim, heads, tokens, dense_ms, sparse_ms}]}``,
for the heads of CogVideoX-2B and 5B and of Wan 2.1 1.3B, 2.2 5B and 2.1 14B. Dense is what PyTorch takes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results_file import RESULTS, ResultFile, checked_out_commit, describe_machine, device_slug  # noqa: E402
from psa_core.bench import HEIGHT, WIDTH, describe_crossover, measure  # noqa: E402

HEADS = ((64, 30), (64, 48), (128, 12), (128, 24), (128, 40))
FRAMES = (2, 3, 4, 5, 6, 8, 10)
KEY = ("head_dim", "heads", "tokens")


def main() -> None:
    args = parse_arguments()
    machine = describe_machine(args.commit) | {"density": args.density}
    results = ResultFile.open(args.out / f"crossover-{device_slug()}.json", machine, KEY)
    for head_dim, heads in HEADS:
        timings = [
            measure((frames, HEIGHT, WIDTH), heads, head_dim, torch.bfloat16, args.density) for frames in args.frames
        ]
        for timing in timings:
            times = {"tokens": timing.tokens, "dense_ms": timing.dense_ms, "sparse_ms": timing.sparse_ms}
            results.add({"head_dim": head_dim, "heads": heads} | times)
        print(f"{heads} heads of {head_dim}: {describe_crossover(timings)}", flush=True)
    print(f"wrote {results.path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.15, help="share of the dense work to do")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES, help="lengths, in frames of 1560 tokens")
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    return args


if __name__ == "__main__":
    main()
