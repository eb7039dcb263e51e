"""Sentences of the documents that say what was measured, from the result files. People write them; a test compares."""

from __future__ import annotations

from benchmarks.table_rows import (
    CASES,
    COGVIDEOX,
    COGVIDEOX_1_5,
    H200,
    NOISES,
    WAN_1_3B,
    WAN_14B,
    attention,
    bare,
    changes,
    exponent,
    fidelity,
    per_head,
    spread,
    steps,
)
from benchmarks.tables import GUIDE, NOTES, README


def said_of_attention() -> list[str]:
    by_key, h200, second = attention(), attention(H200), attention(H200, "second-host-attention")
    dense = {case: by_key[case, "structured", "cudnn", ""] for case in CASES}
    sparse = {case: by_key[case, "structured", "psa", "density 0.15"] for case in CASES}
    longer: dict[bool, list[float]] = {True: [], False: []}
    for (case, kind, method, preset), record in by_key.items():
        if preset == "density 0.15, 256 MiB":
            longer[kind == "structured"].append(
                100 * (record["ms"] / by_key[case, kind, method, "density 0.15"]["ms"] - 1)
            )
    small = {case: by_key[case, "structured", "psa", "density 0.15, 256 MiB"] for case in (WAN_14B, COGVIDEOX)}
    random = {case: by_key[case, "random", "psa", "density 0.15"] for case in CASES}
    harder = [100 * (random[case]["ms"] / sparse[case]["ms"] - 1) for case in CASES]
    does = {case: by_key[case, "random", "psa", "balanced"]["density"] for case in CASES}
    others = [density for case, density in does.items() if case != WAN_14B]

    def flex(case: str, preset: str = "top-k, key blocks of 64", method: str = "flex") -> str:
        return f"{by_key[case, 'structured', method, preset]['effective_tflops']:.0f}"

    pairs = [
        f"{flex(case)}{unit} against {flex(case, method='psa')} at {name}"
        for case, unit, name in (
            (WAN_14B, " TFLOP/s", "Wan 14B"),
            (COGVIDEOX, "", "CogVideoX-5B"),
            (COGVIDEOX_1_5, "", "CogVideoX1.5"),
        )
    ]
    wide = [flex(case, "top-k, key blocks of 128") for case in (COGVIDEOX, COGVIDEOX_1_5)]
    there, dense_there = (
        h200[WAN_14B, "structured", "psa", "density 0.15"],
        h200[WAN_14B, "structured", "cudnn", ""]["ms"],
    )
    rest = sum(there["stages_ms"][stage] for stage in ("prepare", "importance", "select"))
    prepared = [
        max(
            device[WAN_1_3B, f"learned {noise}", "psa", "error of sol_attn tau 1"]["stages_ms"]["prepare"]
            for noise in NOISES
        )
        for device in (by_key, h200)
    ]
    queued = {key: record["ms"] for key, record in h200.items() if key[2] == "psa" and 2 < record["ms"] < 5}
    slower = [100 * (second[key]["ms"] / ms - 1) for key, ms in queued.items() if key in second]
    on_second = [second[WAN_14B, "structured", method, "top-k, key blocks of 64"] for method in ("flex", "psa")]
    return [
        f"(cuDNN dense {dense[WAN_14B]['effective_tflops']:.0f} TFLOP/s)",
        f"CogVideoX1.5 (cuDNN {dense[COGVIDEOX_1_5]['effective_tflops']:.0f})",
        f"(dense {dense[WAN_14B]['ms']:.1f} ms)",
        f"(dense {dense[COGVIDEOX]['ms']:.1f} ms)",
        f"level 1 alone runs at {flex(WAN_14B, method='psa')} TFLOP/s (top-k), lists with pooled levels at "
        f"{sparse[WAN_14B]['effective_tflops']:.0f}.",
        f"takes {spread(longer[True])} % longer at density .15 on structured input and {spread(longer[False])} % on "
        f"other input: {small[WAN_14B]['ms']:.1f} ms and {small[WAN_14B]['extra_mib']:.0f} MiB at Wan 14B, "
        f"{small[COGVIDEOX]['ms']:.2f} ms and {small[COGVIDEOX]['extra_mib']:.0f} MiB at CogVideoX-5B.",
        ", ".join(pairs) + ".",
        f"its own default tile runs at {' and '.join(wide)}.",
        f"takes {spread(harder)} % longer than structured input at density .15: {random[WAN_14B]['ms']:.1f} ms against "
        f"{sparse[WAN_14B]['ms']:.1f} at Wan 14B, {random[COGVIDEOX_1_5]['ms']:.1f} against "
        f"{sparse[COGVIDEOX_1_5]['ms']:.1f} at CogVideoX1.5. `balanced` then does what it must, "
        f"{bare(min(others), 2)} to {bare(max(others), 2)} of the dense work for all but Wan 14B "
        f"({bare(does[WAN_14B], 3)}).",
        f"{bare(per_head('psa', 'balanced', WAN_1_3B), 3)} to {bare(per_head('psa', 'balanced', WAN_14B), 3)} ms, an "
        f"exponent of {exponent('psa', 'balanced'):.2f}, which is {2 ** exponent('psa', 'balanced'):.2f}x for twice "
        f"the tokens (dense {2 ** exponent('cudnn', ''):.1f}x).",
        f"whose `prepare` took up to {bare(prepared[0], 1)} ms on that H100's host and "
        f"{bare(prepared[1], 1)} on the H200's.",
        f"all in: {there['ms']:.1f} ms (cuDNN {dense_there:.1f}); everything but the sparse kernel {rest:.1f} ms, "
        f"{100 * rest / dense_there:.1f} % of dense.",
        f"calls that take 2 to 5 ms when queued took {spread(slower)} % longer there.",
        f"takes {on_second[0]['ms']:.1f} ms (Wan 14B), PSA's own kernel with finding the blocks "
        f"{on_second[1]['ms']:.1f} ms, both at error {bare(on_second[0]['rel_l2'], 3)}.",
    ]


def said_of_choices() -> list[str]:
    def more(choice: str, *lengths: int) -> list[float]:
        return [100 * (times - 1) for times in changes(choice, *lengths)]

    def less(choice: str, *lengths: int) -> list[float]:
        return [100 * (1 - times) for times in changes(choice, *lengths)]

    def saved(choice: str, *lengths: int) -> list[float]:
        """By how much the default's error is below the choice's."""
        return [100 * (1 - 1 / times) for times in changes(choice, *lengths) if times > 1]

    long, short = fidelity(32760), fidelity(4992)
    raster, gilbert = (bare(long[order, 0.3]["rel_l2"], 3) for order in ("order raster", "default"))
    weight = "error_weight 0.001"
    densities = [", ".join(bare(by_key[weight, noise]["density"], 2) for noise in NOISES) for by_key in (long, short)]
    first = ", ".join(bare(long["default", noise]["first_frame"], 3) for noise in NOISES)
    return [
        f"Gilbert's error is {spread(saved('order tile 4x4x4'))} % below that of 4 x 4 x 4 tiles and "
        f"{spread(saved('order raster'))} % below raster's",
        f"raster is best ({raster} against {gilbert})",
        f"lower the error by {spread(less('query blocks of 64'))} %, **key blocks of 32** by "
        f"{spread(less('key blocks of 32'))} %",
        f"changes the error by {max(map(abs, more('importance from every row'))):.0f} % at most",
        f"lowers it by {spread(saved('without the second-order term', 32760))} % at 32760 tokens and by "
        f"{spread(saved('without the second-order term', 4992))} % at 4992",
        f"the whole's {spread(changes('first latent frame exact', 32760), 1)} times as large at 32760 tokens and "
        f"{spread(changes('first latent frame exact', 4992), 1)} times at 4992",
        f"the first frame's error is that of the others ({first})",
        f"alone raise it by {spread(more('levels 1 and block'))} %, the official kind of top-k to "
        f"{spread(changes('top-k 1 2 8 skip', 32760), 1)} times as much at 32760 tokens and "
        f"{spread(changes('top-k 1 2 8 skip', 4992), 1)} at 4992",
        f"The density moves ({densities[0]} and {densities[1]} at .001)",
    ]


def said_of_topk() -> list[str]:
    return [f"the error of top-k is {spread(changes('top-k 1 2 8 skip', 32760), 1)} times as large"]


def said_of_steps() -> list[str]:
    """In the README."""
    found = [r["density"] for key, r in steps().items() if key[2] == "density 0.15"]
    novram = steps("novram")
    dense, sparse = novram["wan2.1_1.3b", "dense", ""], novram["wan2.1_1.3b", "psa", "balanced"]
    peak = max(r["peak_vram_mib"] for r in novram.values()) / 1024
    usual = steps()["wan2.1_1.3b", "psa", "balanced"]["peak_vram_mib"] / 1024
    return [
        f"measured: {spread(found, 2)}",
        f"takes {peak:.1f} GiB, and {sparse['seconds_per_step']:.2f} s a step with PSA instead of "
        f"{dense['seconds_per_step']:.2f} s",
        f"at 832x480 and 81 frames sampling takes {usual:.1f} GiB",
    ]


def said_of_whole_steps() -> list[str]:
    """In the notes."""
    by_key, novram = steps(), steps("novram")
    cudnn, sparse = by_key["wan2.1_14b", "dense cudnn", ""], by_key["wan2.1_14b", "psa", "density 0.15"]
    rest = sparse["seconds_per_step"] * (1 - sparse["attention_share"])
    large, cogvideox = by_key["wan2.1_14b", "psa", "balanced"], by_key["cogvideox_5b", "psa", "balanced"]
    found = [r["density"] for key, r in by_key.items() if key[2] == "density 0.15"]
    low, usual = novram["wan2.1_1.3b", "psa", "balanced"], by_key["wan2.1_1.3b", "psa", "balanced"]
    peaks = [r["peak_vram_mib"] / 1024 for r in (low, usual)]
    spared = novram["wan2.1_1.3b", "dense", ""]["seconds_per_step"]
    return [
        f"{by_key['wan2.1_14b', 'dense', '']['seconds_per_step']:.1f} s a step with ComfyUI's default attention, "
        f"{cudnn['seconds_per_step']:.1f} s with cuDNN, {sparse['seconds_per_step']:.1f} s at density "
        f"{bare(sparse['density'], 2)}. What is left is {rest:.1f} s of everything but self-attention.",
        f"`balanced` runs at {bare(large['density'], 3)} ({large['seconds_per_step']:.1f} s a step) at Wan 14B and at "
        f"{bare(cogvideox['density'], 2)} at CogVideoX-5B.",
        f"came out at {bare(min(found), 2)} to {bare(max(found), 2)}.",
        f"({peaks[0]:.1f} instead of {peaks[1]:.1f} GiB): {spared:.2f} s dense, {bare(low['seconds_per_step'], 2)} s "
        f"with `balanced`, of which attention is {bare(low['seconds_per_step'] * low['attention_share'], 2)}. Fetching "
        f"{peaks[1] - peaks[0]:.1f} GiB",
    ]


SAID = (
    (README, said_of_steps),
    (GUIDE, said_of_topk),
    (NOTES, said_of_attention),
    (NOTES, said_of_choices),
    (NOTES, said_of_whole_steps),
)
