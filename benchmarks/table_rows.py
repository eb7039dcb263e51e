"""What the documents' tables say, from the result files: a function for each table, which gives the cells of its rows.

A cell of None is the page's own words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from benchmarks.results_file import RESULTS, Record
from psa_core.bench import Timing, crossover

H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"
NOISES = (0.9, 0.6, 0.3)
SHARES = (1, 0.3, 0.2, 0.1, 0)
WAN_14B, WAN_1_3B, WAN_5B = "wan2.1_14b_720p_81f", "wan2.1_1.3b_480p_81f", "wan2.2_5b_704p_121f"
COGVIDEOX, COGVIDEOX_1_5 = "cogvideox_5b_480p_49f", "cogvideox1.5_5b_768p_81f"
CASES = (WAN_14B, WAN_1_3B, WAN_5B, COGVIDEOX, COGVIDEOX_1_5)
SOL_CASES = (WAN_14B, WAN_1_3B, WAN_5B)

Rows = list[list[str | None]]


def document(name: str) -> Record:
    found: Record = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return found


def records(name: str) -> list[Record]:
    found: list[Record] = document(name)["records"]
    return found


def bare(value: float, digits: int) -> str:
    """Without the zero before the point, as the notes write it."""
    return f"{value:.{digits}f}".removeprefix("0")


def spread(values: list[float], digits: int = 0) -> str:
    """The least and the greatest."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


# Attention alone


def attention(device: str = H100, file: str = "attention") -> dict[tuple[str, str, str, str], Record]:
    """Records by case, input, method and preset."""
    found = records(f"{file}-{device}")
    return {(r["case"], r["input"], r["method"], r["preset"]): r for r in found if "ms" in r}


def speed() -> Rows:
    by_key, rows = attention(), []
    for case in CASES:
        dense, sparse = by_key[case, "structured", "cudnn", ""], by_key[case, "structured", "psa", "density 0.15"]
        faster = f"{dense['ms'] / sparse['ms']:.1f}x"
        times = f"{dense['ms']:.1f} ms", f"{sparse['ms']:.1f} ms"
        rows.append([None, str(sparse["tokens"]), *times, faster, f"{sparse['rel_l2']:.3f}"])
    return rows


def presets() -> Rows:
    by_key, rows = attention(), []
    for name in ("quality_1", "balanced_1", "fast_1"):
        cells: list[str | None] = [f"`{name}`"]
        # A file from before there were others has no _1 in their names.
        known = any(preset == name for *_, preset in by_key)
        for noise in NOISES:
            sparse = by_key[WAN_1_3B, f"learned {noise}", "psa", name if known else name.removesuffix("_1")]
            faster = by_key[WAN_1_3B, f"learned {noise}", "cudnn", ""]["ms"] / sparse["ms"]
            cells.append(f"{faster:.1f}x, density {sparse['density']:.2f}, error {sparse['rel_l2']:.3f}")
        rows.append(cells)
    return rows


def sol_share(by_key: dict[tuple[str, str, str, str], Record], case: str, noise: float) -> float:
    """PSA's time at the error of Sol-Attn, as a share of its time."""
    sparse = by_key[case, f"learned {noise}", "psa", "error of sol_attn tau 1"]
    share: float = sparse["ms"] / by_key[case, f"learned {noise}", "sol_attn", "tau 1"]["ms"]
    return share


def sol_attn() -> Rows:
    h100, h200, rows = attention(), attention(H200), []
    for case in SOL_CASES:
        for noise in NOISES:
            sparse = h100[case, f"learned {noise}", "psa", "error of sol_attn tau 1"]
            sol = h100[case, f"learned {noise}", "sol_attn", "tau 1"]
            there = bare(sol_share(h200, case, noise), 2) if case == WAN_1_3B else ""
            share, density = bare(sol_share(h100, case, noise), 2), bare(sparse["density"], 3)
            times = f"{sol['ms']:.2f} ms", f"{sparse['ms']:.2f} ms"
            cells = (f"{sparse['tokens']}, {bare(noise, 1)}", bare(sparse["rel_l2"], 3), *times, share, density, there)
            rows.append(list(cells))
    return rows


def per_head(method: str, preset: str, case: str) -> float:
    record = attention()[case, "structured", method, preset]
    milliseconds: float = record["ms"] / record["heads"]
    return milliseconds


def exponent(method: str, preset: str) -> float:
    """Of the time a head takes, in the number of tokens, between the two sizes of Wan 2.1."""
    times, tokens = per_head(method, preset, WAN_14B) / per_head(method, preset, WAN_1_3B), 75600 / 32760
    return math.log(times) / math.log(tokens)


def targets() -> Rows:
    by_key = attention()
    sparse = {case: by_key[case, "structured", "psa", "density 0.15"] for case in CASES}
    rest = sum(sparse[WAN_14B]["stages_ms"][stage] for stage in ("prepare", "importance", "select"))
    shares = " / ".join(bare(sol_share(by_key, WAN_1_3B, noise), 2) for noise in NOISES)
    errors = (sparse[WAN_14B]["rel_l2"], by_key[WAN_1_3B, "learned 0.6", "psa", "density 0.15"]["rel_l2"])
    measured = (
        f"{sparse[WAN_14B]['effective_tflops']:.0f}",
        f"{sparse[COGVIDEOX_1_5]['effective_tflops']:.0f}",
        f"{rest / by_key[WAN_14B, 'structured', 'cudnn', '']['ms']:.1%}".replace("%", " %"),
        f"{sparse[WAN_14B]['ms']:.1f} ms",
        shares,
        f"{sparse[COGVIDEOX]['ms']:.1f} ms",
        f"{sparse[WAN_14B]['extra_mib']:.0f} MiB",
        " / ".join(bare(error, 3) for error in errors),
        f"{2 ** exponent('psa', 'balanced'):.1f}x",
    )
    return [[None, None, None, cell] for cell in measured]


# What a preset should choose


def fidelity(tokens: int) -> dict[tuple[str, float], Record]:
    return {(r["choice"], r["noise"]): r for r in records(f"fidelity-{tokens}-{H200}")}


CHOICES = (
    *("default", "order tile 4x4x4", "order raster", "query blocks of 64", "key blocks of 32", "key blocks of 128"),
    *("importance from every row", "without the second-order term", "levels 1 and block", "first latent frame exact"),
    "top-k 1 2 8 skip",
)


def choices() -> Rows:
    long, short = fidelity(32760), fidelity(4992)
    return [
        [choice, *(f"{bare(long[choice, n]['rel_l2'], 3)} ({bare(short[choice, n]['rel_l2'], 3)})" for n in NOISES)]
        for choice in CHOICES
    ]


def level_sets() -> Rows:
    by_key = fidelity(32760)
    chosen = ("default", "levels 1 and block", "top-k 1 2 8 skip")
    return [[None, *(f"{by_key[choice, noise]['rel_l2']:.3f}" for noise in NOISES)] for choice in chosen]


def error_weights() -> Rows:
    by_key, rows = fidelity(32760), []
    for weight in ("0.0003", "0.001", "0.003", "0.01", "0.03", "0.1"):
        found = [by_key[f"error_weight {weight}", noise] for noise in NOISES]
        rows.append([weight, *(f"{r['density']:.2f}, {r['rel_l2']:.3f}" for r in found)])
    return rows


def error_weights_of_two_lengths() -> Rows:
    rows = []
    for weight in ("0.0003", "0.001", "0.003", "0.01"):
        cells = [
            " ".join(bare(fidelity(tokens)[f"error_weight {weight}", noise]["rel_l2"], 3) for noise in NOISES)
            for tokens in (32760, 4992)
        ]
        rows.append([weight.removeprefix("0"), *cells])
    return rows


def changes(choice: str, *lengths: int) -> list[float]:
    """The error of a choice as a multiple of the default's, at every noise level."""
    return [
        fidelity(tokens)[choice, noise]["rel_l2"] / fidelity(tokens)["default", noise]["rel_l2"]
        for tokens in lengths or (32760, 4992)
        for noise in NOISES
    ]


# From how many tokens on


def crossovers_table() -> tuple[str, Callable[[], Rows]]:
    """The table's first line, and its rows: a file from before families were measured has sizes and one density."""
    if any("family" in r for r in records(f"crossover-{H100}")):
        return "| family | density | sparse pays from | at density .15 | `min_tokens` |", crossovers_of_families
    return "| heads | of dim | sparse pays from |", crossovers_of_sizes


def crossovers_of_families() -> Rows:
    """The preset's density is that of the first length at which it pays."""
    found = records(f"crossover-{H100}")
    ends = {(r["family"], r["method"]): r for r in found if r["tokens"] == 0}
    rows: Rows = []
    for family in dict.fromkeys(r["family"] for r in found):
        preset, density = ends[family, "preset"], ends[family, "density"]
        pays = [
            r["density"]
            for r in found
            if (r["family"], r["method"]) == (family, "preset") and r["tokens"] >= (preset["crossover"] or math.inf)
        ]
        tokens = (preset["crossover"], density["crossover"], preset["min_tokens"])
        rows.append([family, bare(pays[0], 2) if pays else "", *("" if n is None else str(n) for n in tokens)])
    return rows


def crossovers_of_sizes() -> Rows:
    by_size: dict[tuple[int, int], list[Timing]] = {}
    for r in records(f"crossover-{H100}"):
        timing = Timing(r["tokens"], r["dense_ms"], r["sparse_ms"], density=0.15)
        by_size.setdefault((r["head_dim"], r["heads"]), []).append(timing)
    rows: Rows = [[None, str(dim), str(crossover(timings))] for (dim, _), timings in by_size.items()]
    rows[0][2] = f"{rows[0][2]} tokens"
    return rows


# Whole steps


def steps(vram: str = "normal") -> dict[tuple[str, str, str], Record]:
    """Records by model, method and preset."""
    found = records(f"sampling-{H100}")
    return {(r["model"], r["method"], r["preset"]): r for r in found if r["vram"] == vram and "seconds_per_step" in r}


def seconds() -> Rows:
    by_key, rows = steps(), []
    for model in ("wan2.1_14b", "wan2.1_1.3b", "wan2.2_5b", "cogvideox_5b"):
        kinds = ("dense", ""), ("dense cudnn", ""), ("psa", "density 0.15")
        dense, cudnn, sparse = (by_key[model, method, preset]["seconds_per_step"] for method, preset in kinds)
        rows.append([None, f"{dense:.2f} s", f"{cudnn:.2f} s", f"{sparse:.2f} s", f"{dense / sparse:.1f}x"])
    return rows


def start_percents() -> Rows:
    by_key, rows = steps(), []
    for model in ("wan2.1_14b", "wan2.1_1.3b", "wan2.2_5b"):
        dense = by_key[model, "dense cudnn", ""]["seconds_per_step"]
        sparse = by_key[model, "psa", "density 0.15"]["seconds_per_step"]
        rows.append([None, *(f"{share * dense + (1 - share) * sparse:.2f} s" for share in SHARES)])
    return rows


# The kernels


def versions() -> Rows:
    """In TFLOP/s; the best of each head dim is bold."""
    measured: dict[tuple[Any, ...], float] = {
        (int(r["version"]), r["case"][:3], r["block_m"], r["block_n"], r["num_warps"], r["num_stages"]): r[
            "effective_tflops"
        ]
        for r in records(f"attend-variants-{H100}")
        if r["lists"] == "mixed"
    }
    shown = (
        (1, (128, 64, 4, 2), ("wan", "cog")),
        (1, (64, 64, 4, 3), ("wan",)),
        (2, (128, 64, 4, 2), ("wan", "cog")),
        (3, (128, 64, 4, 2), ("wan", "cog")),
        (3, (128, 32, 4, 3), ("wan",)),
        (3, (128, 32, 4, 4), ("wan",)),
        (3, (128, 64, 8, 3), ("wan",)),
        (3, (128, 64, 4, 3), ("cog",)),
    )
    best = {kind: max(value for key, value in measured.items() if key[1] == kind) for kind in ("wan", "cog")}
    rows: Rows = []
    for version, (block_m, block_n, warps, stages), kinds in shown:
        cells: list[str | None] = [None, f"{block_m}x{block_n}, {warps}, {stages}"]
        for kind in ("wan", "cog"):
            value = measured[version, kind, block_m, block_n, warps, stages] if kind in kinds else math.nan
            text = f"**{value:.0f}**" if value == best[kind] else f"{value:.0f}"
            cells.append(text if kind in kinds else "")
        rows.append(cells)
    rows[0][2] = f"{rows[0][2]} TFLOP/s"
    return rows


def settings_on_h200() -> Rows:
    """Head dim 128 and 64 of every change: which sweep, and the setting as it was in that sweep."""
    shown = (
        (0, "(128, 32, 4, 3, 32, False, None)", "(128, 64, 4, 3, 64, False, None)"),
        (0, "(128, 32, 4, 2, 64, True, None)", "(128, 64, 4, 3, 64, True, None)"),
        (1, "(128, 32, 4, 3, 32, False, None, 3)", "(128, 32, 4, 3, 64, True, None, 3)"),
        (1, "", "(64, 32, 4, 3, 64, False, 128, 3)"),
        (2, "(128, 32, 4, 3, 64, True, None, 2)", "(64, 32, 4, 3, 64, False, 128, 3)"),
    )
    sweeps = document(f"kernel-settings-{H200}")["sweeps"]
    rows: Rows = []
    for sweep, *settings in shown:
        measured = {r["job"]: r["tflops"] for r in sweeps[sweep]["records"]}
        jobs = [f"({dim}, 'attend', {setting})" for dim, setting in zip((128, 64), settings, strict=True)]
        rows.append([None, None, *(f"{measured[job]:.0f}" if job in measured else "" for job in jobs)])
    return rows


def few_blocks() -> Rows:
    found = document(f"kernel-settings-{H100}")
    before, after = found["compiled"]["instructions"].values()
    narrow, wide = [64, 32, 4, 3, 64, 3, False, 128], [128, 32, 4, 3, 64, 3, False, 168]
    shipped = [128, 32, 4, 3, 64, 2, True, None]

    def rates(case: str, config: str, setting: list[object]) -> list[float]:
        """Before, and after in every run."""
        return [
            r["tflops"]
            for r in found["records"]
            if r.get("setting") == setting
            and (r["case"], r.get("config")) == (case, config)
            and not r["version"].startswith("the same")
        ]

    def two_runs(rates: list[float]) -> str:
        return f"{rates[0]:.1f} to {min(rates[1:]):.1f}..{max(rates[1:]):.1f} (two runs)"

    counts = {
        dim: (", ".join(str(after[dim][level]) for level in ("4", "8", "whole")), before[dim]["4, 8, whole"])
        for dim in ("D128", "D64")
    }
    dense, balanced = rates("cog1.5", "0.15", narrow), rates("cog1.5", "balanced", narrow)
    wide_dense, wide_balanced = rates("cog1.5", "0.15", wide)[-1], rates("cog1.5", "balanced", wide)[-1]
    large, large_balanced = rates("wan14b", "0.15", shipped), rates("wan14b", "balanced", shipped)
    measured = (
        f"{counts['D128'][0]} instead of {counts['D128'][1]}",
        f"{counts['D64'][0]} instead of {counts['D64'][1]}",
        f"{two_runs(dense)}; with 128 rows below {wide_dense:.1f}",
        f"{two_runs(balanced)}; with 128 rows {wide_balanced:.1f}",
        " to ".join(f"{rate:.1f}" for rate in large),
        " to ".join(f"{rate:.1f}" for rate in large_balanced),
    )
    return [[None, None, cell] for cell in measured]


# The rest


def first_use() -> Rows:
    def of(file: str, cache: str) -> list[str | None]:
        found = [r for r in records(f"{file}-{H100}") if r["cache"] == cache]
        return [", ".join(f"{r['seconds']:.1f}" for r in found if r["head_dim"] == dim) for dim in (128, 64)]

    one, two = "first-use-one-thread", "first-use"
    return [[None, *of(one, "empty")], [None, *of(two, "empty")], [None, *of(two, "filled")]]


def demo_presets() -> Rows:
    return [
        [f"`{r['preset']}`", bare(r["density"], 2), f"{r['psnr_db']:.1f} dB", bare(r["ssim"], 3)]
        for r in records("demo-presets-cpu")
    ]
