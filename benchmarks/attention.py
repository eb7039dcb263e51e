"""Time, error and memory of one attention call: dense backends, PSA at every preset and at one density, and peers.

    python benchmarks/attention.py                     everything, on a CUDA device (many minutes)
    python benchmarks/attention.py --cases wan2.1_14b --inputs structured --methods cudnn,psa

Inputs are synthetic (``structured``), captured from the demo's model at three noise levels (``learned``, head dim 128
only), or noise (``random``, whose errors say nothing and are left out). Peers are measured where they are installed:
SageAttention, comfy-kitchen's int8_attention and sol_attn; the PSA authors' code with ``--official PATH``, a checkout
of it. FlexAttention gets the very key blocks that PSA attends when its levels are exact and skip, in the same order of
tokens: the same work, kernel against kernel. Its block mask is given, putting tokens in order and back is in its time;
for PSA, finding the blocks is in it too. ``matched`` is PSA with the error_weight that brings its error just under
Sol-Attn's (tau 1): the two compared at equal fidelity.

Writes ``attention-<device>.json``: ``{device, versions, commit, records}``, a record per case, input, method and
preset. Times are medians of CUDA events, of PSA with the statistics that the patch node asks for; ``effective_tflops``
are the FLOPs that the levels need over the time of the attention kernel (of the whole call where that is not known);
errors are against fp32 dense attention on a sample of heads, the first and the last among them. A peer that cannot run
has a record that says why it ``failed``. The file is saved after every record, and a later run of the same device,
versions and commit goes on with it.
"""

from __future__ import annotations

import argparse
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
sys.path.append(str(ROOT))

from benchmarks.learned import capture  # noqa: E402
from benchmarks.measure import errors, exact_heads, timed  # noqa: E402
from benchmarks.peers import (  # noqa: E402
    FLEX_KEY_BLOCKS,
    PEERS,
    Run,
    Unavailable,
    exact_blocks_config,
    exact_blocks_name,
    official,
    sol_attn,
)
from benchmarks.results_file import (  # noqa: E402
    RESULTS,
    Record,
    ResultFile,
    checked_out_commit,
    describe_machine,
    device_slug,
)
from psa_core import PSAConfig, TokenLayout, TokenOrder, plan_order, psa_attention  # noqa: E402
from psa_core.attention import heads_per_chunk  # noqa: E402
from psa_core.backends import resolve  # noqa: E402
from psa_core.bench import config_of_density  # noqa: E402
from psa_core.presets import load_presets  # noqa: E402
from psa_core.synthetic import structured  # noqa: E402

TARGET_DENSITY = 0.15
PLAIN = ", keys as they come"  # PSAConfig's defaults, where a density is else that of balanced's settings
SMALL_WORKSPACE = 256  # MiB, half the default
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
METHODS = (*SDPA, "psa", *PEERS, "matched")
MATCHED_TAU = "tau 1"
KEY = ("case", "input", "method", "preset")
NOISES = (0.9, 0.6, 0.3)
STAGES = ("prepare", "importance", "select", "attend", "count")
RANDOM = "random"
INPUTS = ("structured", *(f"learned {noise}" for noise in NOISES), RANDOM)


@dataclass(frozen=True)
class Case:
    """One model at one resolution.

    Args:
        grid: Tokens of the video along time, height, width.
        text: Text tokens in the same sequence, in front.
        heads: Number of heads.
        head_dim: Their size.
        family: Whose presets apply.
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
    "cogvideox_5b_480p_49f": Case((13, 30, 45), 226, 48, 64, "cogvideox_5b"),
    "cogvideox1.5_5b_768p_81f": Case((11, 48, 85), 226, 48, 64, "cogvideox1.5_5b"),
}


def main() -> None:
    args = parse_arguments()
    path = args.out / f"attention-{device_slug()}.json"
    results = ResultFile.open(path, describe_machine(args.commit), KEY)
    for name in args.cases:
        for input_name, (q, k, v) in make_inputs(CASES[name], args.inputs):
            case = replace(CASES[name], heads=q.shape[1])
            exact = None if input_name == RANDOM else exact_heads(q, k, v)
            common = {
                "case": name,
                "input": input_name,
                "tokens": case.layout.tokens,
                "heads": case.heads,
                "head_dim": case.head_dim,
            }
            for method in args.methods:
                for record in measure(method, case, q, k, v, exact, args):
                    results.add(common | record)
                    print_record(common | record)
    print(f"wrote {path}")


def measure(
    method: str, case: Case, q: Tensor, k: Tensor, v: Tensor, exact: Tensor | None, args: argparse.Namespace
) -> Iterator[Record]:
    """Records of one method on one input."""
    if method == "psa":
        yield from measure_configs(configs_of_case(case, q, k, v), case, q, k, v, exact, args.repeats)
    elif method == "matched":
        if exact is not None:
            yield from measure_matched(case, q, k, v, exact, args.repeats)
    elif method in SDPA:
        yield measure_dense(method, case, q, k, v, exact, args.repeats)
    else:
        peer = partial(official, checkout=args.official) if method == "official" else PEERS[method]
        for record in measure_peer(peer(case.layout, q, k, v, TARGET_DENSITY), case, exact, args.repeats):
            yield {"method": method} | record


def parse_arguments() -> argparse.Namespace:
    def names(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            parts = text.split(",")
            for part in parts:
                if not any(name.startswith(part) for name in allowed):
                    raise argparse.ArgumentTypeError(f"{part!r} begins none of {', '.join(allowed)}")
            return [name for name in allowed if any(name.startswith(part) for part in parts)]

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=names(tuple(CASES)), default=list(CASES), help="beginnings of names, comma between"
    )
    parser.add_argument("--inputs", type=names(INPUTS), default=list(INPUTS), help="likewise")
    parser.add_argument("--methods", type=names(METHODS), default=list(METHODS), help="likewise")
    parser.add_argument("--official", type=Path, help="a checkout of ziplab/Pyramid-Sparse-Attention")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each, after two that are not")
    parser.add_argument("--commit", default=checked_out_commit(), help="where there is no git: the commit measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
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
    if RANDOM in wanted:
        yield RANDOM, random_inputs(case)


def random_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Independent normal numbers, in which no key matters more than another."""
    shape = (1, case.layout.tokens, case.heads, case.head_dim)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def structured_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic video tokens behind random text tokens."""
    video = structured(case.grid, case.heads, case.head_dim, seed=0, device="cuda", dtype=torch.bfloat16)
    tensors = []
    for index, x in enumerate(video):
        generator = torch.Generator("cuda").manual_seed(index)
        text = torch.randn(1, case.heads, case.text, case.head_dim, generator=generator, device="cuda").to(x.dtype)
        tensors.append(torch.cat([text, x], dim=2).transpose(1, 2).contiguous().transpose(1, 2))
    return tensors[0], tensors[1], tensors[2]


def measure_dense(
    method: str, case: Case, q: Tensor, k: Tensor, v: Tensor, exact: Tensor | None, repeats: int
) -> Record:
    """One record of a dense backend of PyTorch."""
    with sdpa_kernel(SDPA[method]):
        out, ms, extra = timed(lambda: scaled_dot_product_attention(q, k, v), repeats)
    record = {"method": method, "preset": "", "ms": ms, "effective_tflops": tflops(case, 1.0, ms), "density": 1.0}
    return record | errors_of(out, exact) | {"extra_mib": extra, "stages_ms": {}}


def measure_peer(runs: Iterator[Run], case: Case, exact: Tensor | None, repeats: int) -> Iterator[Record]:
    """A record of every setting of a peer, or why there is none."""
    while True:
        preset = ""
        try:
            run = next(runs, None)
            if run is None:
                return
            preset = run.preset
            record = measure_run(run, case, exact, repeats)
        except Exception as error:  # whatever a peer raises is its result
            record = {"preset": preset, "failed": reason(error)}
            torch.cuda.empty_cache()
        yield record


def measure_run(run: Run, case: Case, exact: Tensor | None, repeats: int) -> Record:
    """The record of one setting of a peer."""
    out, ms, extra = timed(run.attend, repeats)
    measured = errors_of(out, exact)
    stages = {name: round(timed(stage, repeats)[1], 4) for name, stage in run.stages().items()}
    rate = None if run.density is None else tflops(case, run.density, stages.get("attend", ms))
    record = {"preset": run.preset, "ms": ms, "effective_tflops": rate, "density": run.density}
    return record | measured | {"extra_mib": extra, "stages_ms": stages} | run.about


def reason(error: Exception) -> str:
    """What an exception says, in a line."""
    first = str(error).strip().partition("\n")[0][:300]
    return first if isinstance(error, Unavailable) else f"{type(error).__name__}: {first}"


def configs_of_case(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, PSAConfig]:
    """Every preset of the case's family, the common density, the same in less memory, and FlexAttention's blocks."""
    base = plan_order(case.layout, PSAConfig(error_weight=0.0), "cuda")
    configs = {name: preset.config for name, preset in load_presets(ROOT / "presets" / f"{case.family}.yaml").items()}
    for name, config in (("", configs["balanced"]), (PLAIN, PSAConfig(error_weight=0.0))):
        configs[f"density {TARGET_DENSITY}{name}"] = config_of_density(
            lambda weighted: density_of(case, base, weighted, q, k, v), TARGET_DENSITY, config
        )
    configs[f"density {TARGET_DENSITY}, {SMALL_WORKSPACE} MiB"] = replace(
        configs[f"density {TARGET_DENSITY}"], workspace_mib=SMALL_WORKSPACE
    )
    for key_block in FLEX_KEY_BLOCKS:
        configs[exact_blocks_name(key_block)] = exact_blocks_config(case.layout, TARGET_DENSITY, key_block)
    return configs


def measure_matched(case: Case, q: Tensor, k: Tensor, v: Tensor, exact: Tensor, repeats: int) -> Iterator[Record]:
    """One record of PSA with an error as large as Sol-Attn's and no larger."""
    name = f"error of sol_attn {MATCHED_TAU}"
    try:
        rival = next(run for run in sol_attn(case.layout, q, k, v, TARGET_DENSITY) if run.preset == MATCHED_TAU)
    except Unavailable as missing:
        yield {"method": "psa", "preset": name, "failed": str(missing)}
        return
    wanted = errors(rival.attend(), exact)["rel_l2"]
    order = plan_order(case.layout, PSAConfig(error_weight=0.0), "cuda")
    balanced = load_presets(ROOT / "presets" / f"{case.family}.yaml")["balanced"].config

    def error_of(config: PSAConfig) -> float:
        out = psa_attention(q, k, v, layout=case.layout, config=config, order=order, backend="triton")
        assert isinstance(out, Tensor)
        return errors(out, exact)["rel_l2"]

    yield from measure_configs({name: config_of_error(error_of, wanted, balanced)}, case, q, k, v, exact, repeats)


def config_of_error(error_of: Callable[[PSAConfig], float], wanted: float, config: PSAConfig) -> PSAConfig:
    """The config with about the largest error weight whose error is not above ``wanted``."""
    low, high = -5.0, 0.0  # powers of ten
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if error_of(replace(config, error_weight=10.0**middle)) <= wanted else (low, middle)
    return replace(config, error_weight=10.0**low)


def measure_configs(
    configs: dict[str, PSAConfig], case: Case, q: Tensor, k: Tensor, v: Tensor, exact: Tensor | None, repeats: int
) -> Iterator[Record]:
    """A record of PSA for every named config."""
    for name, config in configs.items():
        order = plan_order(case.layout, config, "cuda")

        # With statistics, as the patch node calls it.
        call = partial(
            psa_attention, q, k, v, layout=case.layout, config=config, order=order, backend="triton", stats=True
        )
        (out, stats), ms, extra = timed(call, repeats)
        density = float(stats.density.mean())
        stages = time_stages(case, order, config, q, k, v, repeats)
        record = {
            "method": "psa",
            "preset": name,
            "error_weight": config.error_weight,
            "workspace_mib": config.workspace_mib,
            "ms": ms,
            "effective_tflops": tflops(case, density, stages["attend"]),
            "density": density,
        }
        yield record | errors_of(out, exact) | {"extra_mib": extra, "stages_ms": stages}


def errors_of(out: Tensor, exact: Tensor | None) -> Record:
    """The errors of a record; None each where there is nothing to compare with."""
    return dict.fromkeys(("rel_l2", "rel_l1", "worst_head")) if exact is None else errors(out, exact)


def density_of(case: Case, order: TokenOrder, config: PSAConfig, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Mean density of all heads."""
    _, stats = psa_attention(q, k, v, layout=case.layout, config=config, order=order, backend="triton", stats=True)
    return float(stats.density.mean())


def time_stages(
    case: Case, order: TokenOrder, config: PSAConfig, q: Tensor, k: Tensor, v: Tensor, repeats: int
) -> dict[str, float]:
    """Milliseconds of each stage over all heads, in the chunks in which psa_attention works."""
    backend = resolve("triton", q)
    scale = case.head_dim**-0.5
    size = heads_per_chunk(case.heads, backend.workspace_bytes_per_head(q, order, config), config)
    total = dict.fromkeys(STAGES, 0.0)
    for start in range(0, case.heads, size):
        part = (slice(None), slice(start, start + size))
        qs, ks, vs = q[part], k[part], v[part]

        def time_stage(stage: str, run: Callable[[], Any]) -> Any:
            result, ms, _ = timed(run, repeats)
            total[stage] += ms
            return result

        prepared = time_stage("prepare", partial(backend.prepare, qs, ks, vs, order, config, scale))
        importance = time_stage("importance", partial(backend.importance, prepared))
        selection = time_stage("select", partial(backend.select, prepared, importance))
        time_stage("attend", partial(backend.attend, prepared, selection, torch.empty_like(qs)))
        time_stage("count", partial(backend.count, prepared, selection))
    return {stage: round(ms, 4) for stage, ms in total.items()}


def tflops(case: Case, density: float, ms: float) -> float:
    """TFLOP/s of two matrix products at a density."""
    return 4 * case.layout.tokens**2 * case.head_dim * case.heads * density / ms / 1e9


def print_record(record: Record) -> None:
    """One line of the record that matters."""
    name = f"{record['case']:<24} {record['input']:<11} {record['method']:<14} {record['preset']:<24}"
    if "failed" in record:
        print(f"{name} {record['failed']}", flush=True)
        return
    numbers = f"{record['ms']:8.2f} ms"
    if record["rel_l2"] is not None:
        numbers += f"  error {record['rel_l2']:.4f} (worst {record['worst_head']:.4f})"
    if record["density"] is not None:
        numbers += f"  density {record['density']:.3f}  {record['effective_tflops']:4.0f} TFLOP/s"
    stages = " ".join(f"{stage} {ms:.2f}" for stage, ms in record["stages_ms"].items())
    print(f"{name} {numbers}  +{record['extra_mib']:.0f} MiB  {stages}", flush=True)


if __name__ == "__main__":
    main()
