"""Whether the kernels can be trusted on a GPU: ``python benchmarks/reliability.py``, two to ten minutes.

Writes ``reliability.json``, ``{device, versions, commit, seconds, parts}``:

- ``shapes``: random grids, text, batches, heads and memory layouts, against the reference in fp64 at the same levels,
  with the tolerance of the tests; the whole pipeline, twice, gives the same bits, and still the same where everything
  that PyTorch allocates without a value is filled with NaN and the largest integers.
- ``memory``: what is allocated after so many runs is what was allocated before, within a MiB. A run plans an order,
  attends in many calls, some with statistics, and in every fifth run one call breaks off between two kernels.
- ``sampling``: the same of whole sampling runs in ComfyUI, where ``--comfyui`` or COMFYUI_PATH names one: a third ends,
  a third is interrupted, in a third another node fails.
- ``memcheck``, ``racecheck``: every kernel on a small shape under NVIDIA's compute-sanitizer, where it is found.
- ``memcheck_tests``, ``racecheck_tests``: the kernels' tests under the same, all but the one that looks at the time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the kernels run without a GPU, slowly

from benchmarks import comfy_models  # noqa: E402
from benchmarks.results_file import RESULTS, checked_out_commit, describe_machine  # noqa: E402
from pack import load_pack  # noqa: E402

load_pack()

from psa_pack.psa_core import PSAConfig, TokenLayout, plan_order, psa_attention  # noqa: E402
from psa_pack.psa_core.backends import triton  # noqa: E402

from oracle import random_inputs, reference_codes, reference_output, relative_error, rounding_error  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 20251204
KEPT_LIMIT = 2**20
ENDINGS = ("finished", "interrupted", "failed")
BF16 = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter cannot multiply bf16
SANITIZER_PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
CALLS = (__file__, "--call")
GPU_TESTS = ("-m", "pytest", "-q", "-m", "gpu", "-k", "not quick", "-p", "no:cacheprovider", "tests/test_kernels.py")
RANKED = {"levels": (1, 2, 4, 8, "skip"), "ranges": ((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))}

Part = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What kernels are compiled for; everything else about a call is drawn anew for every shape."""

    dtype: torch.dtype
    head_dim: int
    config: PSAConfig


VARIANTS = (
    Variant(BF16, 128, PSAConfig(error_weight=0.3)),
    Variant(BF16, 64, PSAConfig(error_weight=0.3)),
    Variant(torch.float16, 128, PSAConfig(error_weight=0.3)),
    Variant(torch.float16, 64, PSAConfig(error_weight=0.1, key_block=128, levels=(1, 4, "block"), importance_stride=1)),
    Variant(torch.float32, 64, PSAConfig(error_weight=0.3)),
    Variant(torch.float32, 128, PSAConfig(error_weight=0.3, query_block=64, order="tile")),
    Variant(BF16, 128, PSAConfig(selection="topk", order="raster", variance_term=False, **RANKED)),
    Variant(BF16, 64, PSAConfig(selection="threshold", query_block=64, key_block=32, **RANKED)),
)


def main() -> int:
    """Run all parts and write the file; 1 if one failed."""
    args = parse_arguments()
    if args.call:
        call_every_variant()
        return 0
    began = time.perf_counter()
    parts: dict[str, Part] = {}
    for name, run in {
        "shapes": lambda: check_shapes(args.shapes, args.seconds),
        "memory": lambda: check_memory(args.runs, args.seconds),
        "sampling": lambda: check_sampling(args.comfyui, args.runs, args.seconds),
        "memcheck": lambda: sanitize("memcheck", args.sanitizer, args.seconds),
        "racecheck": lambda: sanitize("racecheck", args.sanitizer, args.seconds),
        "memcheck_tests": lambda: sanitize("memcheck", args.sanitizer, args.test_seconds, GPU_TESTS),
        "racecheck_tests": lambda: sanitize("racecheck", args.sanitizer, args.test_seconds, GPU_TESTS),
    }.items():
        started = time.perf_counter()
        parts[name] = run()
        parts[name]["seconds"] = round(time.perf_counter() - started, 1)
        print(f"{name}: {json.dumps(parts[name])}", flush=True)
    result = describe_machine(args.commit) | {"seconds": round(time.perf_counter() - began, 1), "parts": parts}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "reliability.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 1 if any(part["state"] == "failed" for part in parts.values()) else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=200, help="random shapes")
    parser.add_argument("--runs", type=int, default=50, help="runs of the memory and sampling parts")
    parser.add_argument("--seconds", type=float, default=60, help="after which a part ends and says how far it came")
    parser.add_argument("--test-seconds", type=float, default=600, help="the same for the tests under the sanitizer")
    parser.add_argument("--sanitizer", default=find_sanitizer(), help="compute-sanitizer, where it is not in its place")
    parser.add_argument("--comfyui", type=Path, default=comfy_models.comfyui_path(), help="default: COMFYUI_PATH")
    parser.add_argument("--call", action="store_true", help="only call every kernel, for the sanitizer")
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit checked")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def random_layout(chance: random.Random, most: int) -> TokenLayout:
    """A video of at most ``most`` tokens, with text on either side and exact tokens inside."""
    t, h = chance.randint(1, 9), chance.randint(1, 23)
    grid = (t, h, chance.randint(1, max(most // (t * h), 1)))
    before, after = chance.choice([0, 0, 1, 77, 226]), chance.choice([0, 0, 0, 33])
    tokens = before + grid[0] * grid[1] * grid[2] + after
    start = chance.randrange(tokens)
    return TokenLayout(grid, before, tokens, chance.choice([(), (), ((start, min(start + 50, tokens)),)]))


def make_inputs(chance: random.Random, variant: Variant, layout: TokenLayout) -> tuple[Tensor, ...]:
    """q, k, v ``[B, H, N, D]``, contiguous or in the memory layout in which ComfyUI passes them."""
    inputs = random_inputs(
        layout, variant.head_dim, batch=chance.randint(1, 2), heads=chance.randint(1, 3), seed=chance.getrandbits(31)
    )
    moved = tuple(x.to(DEVICE, variant.dtype) for x in inputs)
    return moved if chance.random() < 0.5 else tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in moved)


def check_shapes(shapes: int, seconds: float) -> Part:
    """Random shapes against the reference, poisoned and not."""
    compile_all()
    chance, until = random.Random(SEED), time.perf_counter() + seconds
    worst, failures, tokens = 0.0, [], 0
    for done in range(shapes):
        if time.perf_counter() > until:
            break
        variant, layout = VARIANTS[done % len(VARIANTS)], random_layout(chance, 1200 if DEVICE == "cuda" else 150)
        q, k, v = make_inputs(chance, variant, layout)
        tokens += layout.tokens
        share, wrong = compare(variant, layout, q, k, v)
        worst = max(worst, share)
        failures += [f"{layout}, {tuple(q.shape)}, {variant}: {what}" for what in wrong]
    else:
        done = shapes
    state = "failed" if failures else "passed" if done == shapes else "out of time"
    return {
        "state": state,
        "shapes": done,
        "wanted": shapes,
        "mean_tokens": round(tokens / max(done, 1)),
        "worst_error_of_tolerance": worst,
        "failures": failures[:10],
    }


def compare(variant: Variant, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, list[str]]:
    """Error of the kernels as a share of what is tolerated, and what is wrong."""
    config, scale = variant.config, variant.head_dim**-0.5
    order = plan_order(layout, config, DEVICE)
    codes = reference_codes(q, k, v, order, config, scale)
    exact = reference_output(q, k, v, order, config, scale, codes)
    tolerated = 2 * rounding_error(q, k, v, order, config, scale, codes) + 2e-6
    video = codes[:, :, : order.queries.video_blocks, : order.keys.video_blocks].contiguous()

    def attend_at_given_levels() -> Tensor:
        prepared = triton.prepare(q, k, v, order, config, scale)
        out = torch.full_like(q, float("nan"))
        triton.attend(prepared, triton.select_given(prepared, video), out)
        return out

    def attend() -> Tensor:
        out = psa_attention(q, k, v, layout=layout, config=config, backend="triton")
        assert isinstance(out, Tensor)
        return out

    wrong = []
    error = relative_error(poisoned(attend_at_given_levels), exact)
    if not error <= tolerated:
        wrong.append(f"relative error {error:.3g}, at most {tolerated:.3g}")
    first, second, third = attend(), attend(), poisoned(attend)
    if not torch.equal(first, second):
        wrong.append("another run gives other bits")
    if not torch.equal(first, third):
        wrong.append("the result depends on memory that nothing was written to")
    if not torch.isfinite(first).all():
        wrong.append("the result is not finite")
    return error / tolerated, wrong


def poisoned(run: Callable[[], Tensor]) -> Tensor:
    """What a function returns where memory without a value is NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        return run()
    finally:
        torch.use_deterministic_algorithms(False)


class BrokenOff(Exception):
    """What ends a call between two kernels."""


def break_off(*_: Any) -> None:
    """Stands in for a kernel; a mock would keep the tensors it was called with."""
    raise BrokenOff


def check_memory(runs: int, seconds: float) -> Part:
    """Memory before and after many runs."""
    if DEVICE != "cuda":
        return {"state": "not run", "reason": "there is no CUDA device"}
    chance, until = random.Random(SEED), time.perf_counter() + seconds
    run_once(chance, VARIANTS[0], broken_off=True)  # whatever PyTorch and Triton set up once
    torch.cuda.synchronize()
    before, most = torch.cuda.memory_allocated(), 0
    for done in range(runs):
        if time.perf_counter() > until:
            break
        run_once(chance, VARIANTS[done % len(VARIANTS)], broken_off=done % 5 == 4)
        most = max(most, torch.cuda.memory_allocated() - before, key=abs)
    else:
        done = runs
    state = "failed" if abs(most) > KEPT_LIMIT else "passed" if done == runs else "out of time"
    return {"state": state, "runs": done, "wanted": runs, "most_bytes_kept_after_a_run": most}


def run_once(chance: random.Random, variant: Variant, broken_off: bool) -> None:
    """Ten calls on one layout, as a sampling run makes them."""
    layout = random_layout(chance, 20_000)
    order = plan_order(layout, variant.config, DEVICE)
    shape = (chance.randint(1, 2), chance.randint(1, 12), layout.tokens, variant.head_dim)
    for call in range(10):
        q, k, v = (torch.randn(shape, device=DEVICE, dtype=variant.dtype) for _ in range(3))
        psa_attention(q, k, v, layout=layout, config=variant.config, backend="triton", order=order, stats=call % 2 == 0)
    if broken_off:
        try:
            with patch.object(triton, "attend", break_off):
                psa_attention(q, k, v, layout=layout, config=variant.config, backend="triton", order=order)
        except BrokenOff:
            return
        raise AssertionError("the call went on without its last kernel")


def check_sampling(comfyui: Path | None, runs: int, seconds: float) -> Part:
    """Memory before and after many sampling runs of a small model with the patch node."""
    if DEVICE != "cuda" or comfyui is None:
        return {"state": "not run", "reason": "there is no " + ("ComfyUI" if DEVICE == "cuda" else "CUDA device")}
    version = comfy_models.import_comfyui(comfyui)
    video = comfy_models.shrink(comfy_models.MODELS["wan2.1_1.3b"])
    node = import_module("psa_pack.nodes.attention_patch").PSAAttentionPatch
    (model,) = node.execute(
        comfy_models.load(video, BF16), "balanced", start_percent=0.0, min_tokens=0, backend="triton"
    ).result
    sparse_calls: list[int] = []
    for ending in ENDINGS:
        sample_once(model, video, ending)  # whatever ComfyUI sets up once
    before, most, until = allocated_bytes(), 0, time.perf_counter() + seconds
    for done in range(runs):
        if time.perf_counter() > until:
            break
        sparse_calls.append(sample_once(model, video, ENDINGS[done % len(ENDINGS)]))
        most = max(most, allocated_bytes() - before, key=abs)
    else:
        done = runs
    state = "failed" if abs(most) > KEPT_LIMIT or 0 in sparse_calls else "passed" if done == runs else "out of time"
    return {
        "state": state,
        "comfyui": version,
        "runs": done,
        "wanted": runs,
        "least_sparse_calls_of_a_run": min(sparse_calls, default=0),
        "most_bytes_kept_after_a_run": most,
    }


def sample_once(model: Any, video: comfy_models.VideoModel, ending: str) -> int:
    """Sparse attention calls of a run that comes to that ending in its third step."""
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    def step_ended(step: int, *_: Any) -> None:
        if step == 1 and ending == "interrupted":
            interrupt_current_processing()
        if step == 1 and ending == "failed":
            raise BrokenOff

    with contextlib.suppress(InterruptProcessingException, BrokenOff):
        comfy_models.sample(model, video, 4, step_ended)
    run = import_module("psa_pack.nodes.attention_patch").AttentionPatch.find(model).last_run
    if run.outcome != ending:
        raise AssertionError(f"the run {run.outcome}; it should have {ending}")
    return int(run.sparse_calls)


def allocated_bytes() -> int:
    """What PyTorch holds on the GPU for tensors that are still reachable."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def compile_all() -> None:
    """Compile the kernels of all variants side by side; their cache on disk serves this process."""
    if DEVICE == "cuda":
        workers = min(len(VARIANTS), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(call_variant, VARIANTS))


def call_every_variant() -> None:
    """Every kernel once, on small shapes."""
    for variant in VARIANTS:
        call_variant(variant)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def call_variant(variant: Variant) -> None:
    """One call with text, an exact span and a ragged last block."""
    layout = TokenLayout((3, 9, 11), 21, 321, ((100, 120),))
    q, k, v = (x.to(DEVICE, variant.dtype) for x in random_inputs(layout, variant.head_dim))
    psa_attention(q, k, v, layout=layout, config=variant.config, backend="triton", stats=True)
    order = plan_order(layout, variant.config, DEVICE)
    shape = (1, 2, order.queries.video_blocks, order.keys.video_blocks)
    prepared = triton.prepare(q, k, v, order, variant.config, variant.head_dim**-0.5)
    given = triton.select_given(prepared, torch.zeros(shape, dtype=torch.uint8, device=DEVICE))
    triton.attend(prepared, given, torch.empty_like(q))


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    return next((found for found in map(shutil.which, ("compute-sanitizer", *SANITIZER_PLACES)) if found), None)


def sanitize(tool: str, sanitizer: str | None, seconds: float, program: tuple[str, ...] = CALLS) -> Part:
    """A Python program, by default every kernel once, under one of the sanitizer's tools."""
    if sanitizer is None:
        return {"state": "not run", "reason": "compute-sanitizer is not installed"}
    if DEVICE != "cuda":
        return {"state": "not run", "reason": "there is no CUDA device"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, *program]
    # without a cache of its own, PyTorch gives every tensor an allocation whose ends the tool can watch
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"state": "out of time"}
    said = done.stdout + done.stderr
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", said)
    tests = re.findall(r"(\d+ (?:passed|failed).*) in [\d.]+s", said)
    ran: Part = {"tests": tests[-1]} if tests else {"variants": len(VARIANTS)}
    if done.returncode == 0 and summary:
        return {"state": "passed", **ran, "summary": summary[-1]}
    if done.returncode == 99 or any("failed" in line for line in tests):
        return {"state": "failed", "summary": summary, "said": said[-4000:]}
    return {"state": "not run", "reason": f"the tool ended with {done.returncode}: {said.strip()[-1500:]}"}


if __name__ == "__main__":
    sys.exit(main())
