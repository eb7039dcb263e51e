"""Time, error and memory of one attention call: dense backends, peers, and PSA at every preset and at one density.

    python benchmarks/attention.py                     everything, on a CUDA device (several minutes)
    python benchmarks/attention.py --cases wan2.1_14b --inputs structured --methods cudnn,psa

Inputs are synthetic (``structured``) or captured from the demo's model at three noise levels (``learned``, head dim 128
only). Peers are measured where they are installed: comfy-kitchen's int8_attention and sol_attn.

Writes ``attention-<device>.json``: ``{device, versions, commit, records}``, a record per case, input, method and
preset. Times are medians of CUDA events; ``effective_tflops`` are the FLOPs that the levels need over the time of the
attention kernel; errors are against fp32 dense attention on a sample of heads, the first and the last among them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.learned import capture  # noqa: E402
from psa_core import PSAConfig, TokenLayout, TokenOrder, plan_order, psa_attention  # noqa: E402
from psa_core.backends import triton as backend  # noqa: E402
from psa_core.bench import config_of_density  # noqa: E402
from psa_core.presets import load_presets  # noqa: E402
from psa_core.synthetic import structured  # noqa: E402

ERROR_HEADS = 6
TARGET_DENSITY = 0.15
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PEERS = ("int8_attention", "sol_attn")
SOL_TAUS = (0.5, 1.0, 2.0)  # its routing threshold: larger is cheaper
NOISES = (0.9, 0.6, 0.3)
INPUTS = ("structured", *(f"learned {noise}" for noise in NOISES))


@dataclass(frozen=True)
class Case:
    """One model at one resolution.

    Args:
        grid: Tokens of the video along time, height, width.
        text: Text tokens in the same sequence, in front.
        heads: Number of heads.
        head_dim: Their size.
        family: Whose presets apply; empty if there are none yet.
    """

    grid: tuple[int, int, int]
    text: int
    heads: int
    head_dim: int
    family: str

    @property
    def layout(self) -> TokenLayout:
        """The case's token layout."""
        return TokenLayout(self.grid, video_start=self.text)


CASES = {
    "wan2.1_14b_720p_81f": Case((21, 45, 80), 0, 40, 128, "wan2.1_14b"),
    "wan2.1_1.3b_480p_81f": Case((21, 30, 52), 0, 12, 128, "wan2.1_1.3b"),
    "wan2.2_5b_704p_121f": Case((31, 22, 40), 0, 24, 128, "wan2.2_5b"),
    "cogvideox_5b_480p_49f": Case((13, 30, 45), 226, 48, 64, ""),
    "cogvideox1.5_5b_768p_81f": Case((11, 48, 85), 226, 48, 64, ""),
}


def main() -> None:
    args = parse_arguments()
    records: list[dict[str, Any]] = []
    for name in args.cases:
        for input_name, (q, k, v) in make_inputs(CASES[name], args.inputs):
            case = replace(CASES[name], heads=q.shape[1])
            exact = exact_heads(q, k, v)
            common = {
                "case": name,
                "input": input_name,
                "tokens": case.layout.tokens,
                "heads": case.heads,
                "head_dim": case.head_dim,
            }
            for method in args.methods:
                measure = measure_psa if method == "psa" else measure_peer if method in PEERS else measure_dense
                for record in measure(method, case, q, k, v, exact, args.repeats):
                    records.append(common | record)
                    print_record(records[-1])
    path = args.out / f"attention-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(describe_machine(args.commit) | {"records": records}, indent=1) + "\n")
    print(f"wrote {path}")


def parse_arguments() -> argparse.Namespace:
    def names(allowed: list[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            chosen = [name for name in allowed if any(name.startswith(part) for part in text.split(","))]
            if not chosen:
                raise argparse.ArgumentTypeError(f"{text!r} names none of {', '.join(allowed)}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=names(list(CASES)), default=list(CASES), help="beginnings of names, comma between"
    )
    parser.add_argument("--inputs", type=names(list(INPUTS)), default=list(INPUTS), help="likewise")
    methods = [*SDPA, *PEERS, "psa"]
    parser.add_argument("--methods", type=names(methods), default=methods, help="likewise")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each, after one that is not")
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit measured")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    return args


def make_inputs(case: Case, wanted: list[str]) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """q, k, v ``[1, H, N, D]``, bf16, in the memory layout in which ComfyUI passes them, one kind after the other."""
    if "structured" in wanted:
        yield "structured", structured_inputs(case)
    noises = tuple(noise for noise in NOISES if f"learned {noise}" in wanted)
    if noises and case.head_dim == 128:
        captured = capture(case.grid, noises, seed=0, device="cuda", dtype=torch.bfloat16)
        for noise in noises:
            yield f"learned {noise}", captured.pop(noise)


def structured_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic video tokens behind random text tokens."""
    video = structured(case.grid, case.heads, case.head_dim, seed=0, device="cuda", dtype=torch.bfloat16)
    tensors = []
    for index, x in enumerate(video):
        generator = torch.Generator("cuda").manual_seed(index)
        text = torch.randn(1, case.heads, case.text, case.head_dim, generator=generator, device="cuda").to(x.dtype)
        tensors.append(torch.cat([text, x], dim=2).transpose(1, 2).contiguous().transpose(1, 2))
    return tensors[0], tensors[1], tensors[2]


def sample_heads(heads: int) -> list[int]:
    """Heads that errors are taken on."""
    return sorted({round(i * (heads - 1) / (ERROR_HEADS - 1)) for i in range(ERROR_HEADS)})


def exact_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of the sampled heads in fp32 ``[1, sampled heads, N, D]``."""
    chosen = sample_heads(q.shape[1])
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        parts = [scaled_dot_product_attention(*(x[:, h : h + 1].float() for x in (q, k, v))) for h in chosen]
    return torch.cat(parts, dim=1)


def errors(out: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative L2 and L1 error, and the worst head's relative L2 error."""
    apart = out[:, sample_heads(out.shape[1])].float() - exact
    by_head = apart.norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
    return {
        "rel_l2": float(apart.norm() / exact.norm()),
        "rel_l1": float(apart.abs().sum() / exact.abs().sum()),
        "worst_head": float(by_head.max()),
    }


def measure_dense(
    method: str, case: Case, q: Tensor, k: Tensor, v: Tensor, exact: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """One record of a dense backend of PyTorch."""
    with sdpa_kernel(SDPA[method]):
        out, ms, extra = timed(lambda: scaled_dot_product_attention(q, k, v), repeats)
    record = {"method": method, "preset": "", "ms": ms, "effective_tflops": tflops(case, 1.0, ms), "density": 1.0}
    return [record | errors(out, exact) | {"extra_mib": extra, "stages_ms": {}}]


def measure_peer(
    method: str, case: Case, q: Tensor, k: Tensor, v: Tensor, exact: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """Records of one of comfy-kitchen's kernels; none where it is not installed or does not take the case."""
    if importlib.util.find_spec("comfy_kitchen") is None or (method == "sol_attn" and case.head_dim != 128):
        return []
    kitchen = importlib.import_module("comfy_kitchen")
    runs: dict[str, Callable[[], Tensor]] = {"": lambda: kitchen.int8_attention(q, k, v)}
    if method == "sol_attn":
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        runs = {f"tau {tau:g}": partial(kitchen.sol_attn, qt, kt, vt, tau=tau) for tau in SOL_TAUS}
    records = []
    for preset, run in runs.items():
        out, ms, extra = timed(run, repeats)
        out = out.transpose(1, 2) if method == "sol_attn" else out
        record = {"method": method, "preset": preset, "ms": ms, "effective_tflops": None, "density": None}
        records.append(record | errors(out, exact) | {"extra_mib": extra, "stages_ms": {}})
    return records


def measure_psa(
    method: str, case: Case, q: Tensor, k: Tensor, v: Tensor, exact: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """A record per preset of the case's family, and one at the common density."""
    base = plan_order(case.layout, PSAConfig(error_weight=0.0), "cuda")
    presets = load_presets(ROOT / "presets" / f"{case.family}.yaml") if case.family else {}
    configs = {name: preset.config for name, preset in presets.items()}
    configs[f"density {TARGET_DENSITY}"] = config_of_density(
        lambda config: density_of(case, base, config, q, k, v), TARGET_DENSITY
    )
    records = []
    for name, config in configs.items():
        order = plan_order(case.layout, config, "cuda")

        def attend(config: PSAConfig = config, order: TokenOrder = order) -> Tensor:
            out = psa_attention(q, k, v, layout=case.layout, config=config, order=order, backend="triton")
            assert isinstance(out, Tensor)
            return out

        out, ms, extra = timed(attend, repeats)
        density = density_of(case, order, config, q, k, v)
        stages = time_stages(case, order, config, q, k, v, repeats)
        record = {
            "method": method,
            "preset": name,
            "error_weight": config.error_weight,
            "ms": ms,
            "effective_tflops": tflops(case, density, stages["attend"]),
            "density": density,
        }
        records.append(record | errors(out, exact) | {"extra_mib": extra, "stages_ms": stages})
    return records


def density_of(case: Case, order: TokenOrder, config: PSAConfig, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Mean density of all heads."""
    _, stats = psa_attention(q, k, v, layout=case.layout, config=config, order=order, backend="triton", stats=True)
    return float(stats.density.mean())


def time_stages(
    case: Case, order: TokenOrder, config: PSAConfig, q: Tensor, k: Tensor, v: Tensor, repeats: int
) -> dict[str, float]:
    """Milliseconds of each stage over all heads, chunk by chunk as psa_attention works."""
    scale = case.head_dim**-0.5
    per_head = backend.workspace_bytes_per_head(q, order, config)
    size = max(1, config.workspace_mib * 2**20 // per_head)
    total = dict.fromkeys(("prepare", "importance", "select", "attend"), 0.0)
    for start in range(0, case.heads, size):
        part = (slice(None), slice(start, start + size))
        qs, ks, vs = q[part], k[part], v[part]
        prepared, ms, _ = timed(lambda: backend.prepare(qs, ks, vs, order, config, scale), repeats)  # noqa: B023
        total["prepare"] += ms
        importance, ms, _ = timed(lambda: backend.importance(prepared), repeats)  # noqa: B023
        total["importance"] += ms
        selection, ms, _ = timed(lambda: backend.select(prepared, importance), repeats)  # noqa: B023
        total["select"] += ms
        out = torch.empty_like(qs)
        _, ms, _ = timed(lambda: backend.attend(prepared, selection, out), repeats)  # noqa: B023
        total["attend"] += ms
    return {stage: round(ms, 4) for stage, ms in total.items()}


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """Result, median milliseconds, and peak memory in MiB beyond what the result takes."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - max(torch.cuda.memory_allocated(), before)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return result, sorted(times)[repeats // 2], extra / 2**20


def tflops(case: Case, density: float, ms: float) -> float:
    """TFLOP/s of two matrix products at a density."""
    return 4 * case.layout.tokens**2 * case.head_dim * case.heads * density / ms / 1e9


def checked_out_commit() -> str:
    """The repository's commit, with a plus if files differ from it; empty where git does not know."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    commit = git("rev-parse", "--verify", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "")


def describe_machine(commit: str) -> dict[str, Any]:
    """Device, versions and commit that the records belong to."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "versions": versions, "commit": commit}


def print_record(record: dict[str, Any]) -> None:
    name = f"{record['case']:<24} {record['input']:<11} {record['method']:<14} {record['preset']:<13}"
    numbers = f"{record['ms']:8.2f} ms  error {record['rel_l2']:.4f} (worst {record['worst_head']:.4f})"
    if record["density"] is not None:
        numbers += f"  density {record['density']:.3f}  {record['effective_tflops']:4.0f} TFLOP/s"
    stages = " ".join(f"{stage} {ms:.2f}" for stage, ms in record["stages_ms"].items())
    print(f"{name} {numbers}  +{record['extra_mib']:.0f} MiB  {stages}", flush=True)


if __name__ == "__main__":
    main()
