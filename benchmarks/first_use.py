"""How long a first call waits for its kernels: ``python benchmarks/first_use.py``, about a minute.

Every measurement is a process of its own, begun with PyTorch loaded, a CUDA context and the inputs on the device: what
a sampler has when PSA gets its first call. What is timed is what the patch node then does: the self-check, which
compiles, and the call. First with an empty cache of Triton's, then with the one that this left behind.

Writes ``first-use-<device>.json``: ``{device, versions, commit, cpu, cores, records: [{head_dim, cache, run, seconds,
self_check_seconds, second_call_seconds, other_size_seconds, kernels, kernels_of_other_size}]}``, bf16. ``cache`` is
``empty`` or ``filled``, ``kernels`` how many were put into it; the other size is that of another video, for which
nothing should be compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
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

HEADS = {128: 12, 64: 48}  # Wan 2.1 1.3B, CogVideoX-5B
GRID, OTHER_GRID = (21, 30, 52), (13, 30, 45)
KEY = ("head_dim", "run", "cache")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.here:
        print(json.dumps(measure_here(args.here, HEADS[args.here], (GRID, OTHER_GRID), "cuda")))
        return
    machine = describe_machine(args.commit) | {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    results = ResultFile.open(args.out / f"first-use-{device_slug()}.json", machine, KEY)
    for head_dim in HEADS:
        for run in range(args.runs):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("empty", "filled"):
                    record = {"head_dim": head_dim, "run": run, "cache": state} | measure_apart(head_dim, cache)
                    results.add(record)
                    print(json.dumps(record), flush=True)
    print(f"wrote {results.path}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="with an empty cache, for each head dim")
    parser.add_argument("--here", type=int, choices=HEADS, help="measure in this process, with the cache as it is")
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    return args


def measure_apart(head_dim: int, cache: str) -> Record:
    """:func:`measure_here` in a new process with a cache folder of its own."""
    command = [sys.executable, __file__, "--here", str(head_dim)]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    record: Record = json.loads(run.stdout.splitlines()[-1])
    return record


def measure_here(head_dim: int, heads: int, grids: tuple[tuple[int, int, int], ...], device: str) -> Record:
    """Time the first call, the next one, and the first of another size."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = [torch.randn(3, 1, heads, t * h * w, head_dim, device=device, dtype=dtype) for t, h, w in grids]
    wait(device)
    began, before = time.perf_counter(), count_kernels()

    from psa_core import PSAConfig, TokenLayout, psa_attention  # only now: loading them is part of it
    from psa_core.self_check import self_check

    config = PSAConfig(error_weight=0.0017)

    def call(index: int) -> float:
        start = time.perf_counter()
        q, k, v = inputs[index]
        psa_attention(q, k, v, layout=TokenLayout(grids[index]), config=config, backend="triton")
        wait(device)
        return time.perf_counter() - start

    self_check(torch.device(device), dtype, head_dim, "triton", config)
    checked = time.perf_counter()
    call(0)
    seconds, kernels = time.perf_counter() - began, count_kernels()
    return {
        "seconds": seconds,
        "self_check_seconds": checked - began,
        "second_call_seconds": call(0),
        "other_size_seconds": call(1),
        "kernels": kernels - before,
        "kernels_of_other_size": count_kernels() - kernels,
    }


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def count_kernels() -> int:
    """Compiled kernels in Triton's cache, where one of its own is set."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    return len(list(Path(cache).rglob("*.cubin"))) if cache else 0


def cpu_name() -> str:
    """The processor that compiles."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
