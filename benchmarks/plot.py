"""Pictures of the benchmarks' results, each for a light and a dark page: ``docs/<picture>-<theme>.svg``.

    python benchmarks/plot.py                                     where one device has results
    python benchmarks/plot.py --device nvidia-h100-80gb-hbm3      otherwise

``pareto``: error against time of every method, a panel per case (``pareto-all``: per case and input). ``tokens``: time
against the length of the video. ``stages``: where PSA's time goes. ``sampling``: whole steps in ComfyUI, where there
are results of it. ``videos``: whole videos of small models, PSNR against work and time (``videos-all``: at every length
and number of steps). A method's line joins what none of its other settings beats in time and error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.plot_style import GREY, STYLES, THEMES, Style, Theme, dress, grouped, numbers  # noqa: E402
from benchmarks.plot_videos import draw_videos, main_case  # noqa: E402
from benchmarks.results_file import RESULTS, Record  # noqa: E402
from benchmarks.trade_off import cases_of  # noqa: E402

TITLES = {
    "wan2.1_14b_720p_81f": "Wan 2.1 14B, 720p",
    "wan2.1_1.3b_480p_81f": "Wan 2.1 1.3B, 480p",
    "wan2.2_5b_704p_121f": "Wan 2.2 5B, 704p",
    "cogvideox_5b_480p_49f": "CogVideoX 5B, 480p",
    "cogvideox1.5_5b_768p_81f": "CogVideoX1.5 5B, 768p",
    "wan2.1_14b": "Wan 2.1 14B\n1280x720, 81 frames",
    "wan2.1_1.3b": "Wan 2.1 1.3B\n832x480, 81 frames",
    "wan2.2_5b": "Wan 2.2 5B\n1280x704, 121 frames",
    "cogvideox_5b": "CogVideoX 5B\n720x480, 49 frames",
}
MAIN_INPUTS = ("learned 0.6", "structured")  # a case's panel shows the first of these that was measured
FIXED_DENSITY = "density 0.15"
DENSE = ("cudnn", "flash")
STAGES = {"prepare": "#7ab8f0", "importance": "#0fa37c", "select": "#d99a00", "attend": "#2b87e3", "count": "#c973ae"}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    matplotlib.rcParams |= {"svg.hashsalt": "psa", "font.size": 8.5}  # the same results give the same bytes
    attention = read_records(args.results / f"attention-{args.device}.json")
    sampling = read_records(args.results / f"sampling-{args.device}.json")
    videos = read_records(args.results / f"whole-video-{args.device}.json")
    pictures: dict[str, Callable[[Theme], Figure]] = {}
    if attention:
        pictures = {
            "pareto": lambda theme: draw_pareto(main_panels(attention), theme),
            "pareto-all": lambda theme: draw_pareto(all_panels(attention), theme),
            "tokens": lambda theme: draw_tokens(attention, theme),
            "stages": lambda theme: draw_stages(attention, theme),
        }
    if sampling:
        pictures["sampling"] = lambda theme: draw_sampling(sampling, theme)
    if videos:
        cases = cases_of(videos, "test") or cases_of(videos, "tuning")
        pictures["videos"] = lambda theme: draw_videos(main_case(cases), theme)
        pictures["videos-all"] = lambda theme: draw_videos(cases, theme)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        for theme in THEMES:
            path = args.out / f"{name}-{theme.name}.{args.format}"
            draw(theme).savefig(path, facecolor=theme.page, metadata={"Date": None} if args.format == "svg" else None)
            print(f"wrote {path}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="as in the names of the results' files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(arguments)
    kinds = ("attention-", "sampling-", "whole-video-")
    devices = sorted({path.stem.removeprefix(kind) for kind in kinds for path in args.results.glob(f"{kind}*.json")})
    if args.device is None and len(devices) == 1:
        args.device = devices[0]
    if args.device not in devices:
        there_are = ", ".join(devices) or "none"
        parser.error(f"argument --device: {args.device!r} has no results in {args.results}; there are {there_are}")
    return args


def read_records(path: Path) -> list[Record]:
    """What was measured; what failed is left out. Empty where there is no file."""
    if not path.exists():
        return []
    records: list[Record] = json.loads(path.read_text(encoding="utf-8"))["records"]
    return [record for record in records if "failed" not in record]


def main_panels(records: list[Record]) -> dict[str, list[Record]]:
    """One panel for every case, with its most telling input."""
    panels = {}
    for (case,), of_case in in_order(grouped(records, "case")).items():
        by_input = grouped(of_case, "input")
        chosen = next((name for name in MAIN_INPUTS if (name,) in by_input), None)
        if chosen is not None:
            panels[f"{TITLES.get(case, case)}\n{of_case[0]['tokens']} tokens, {chosen}"] = by_input[(chosen,)]
    return panels


def all_panels(records: list[Record]) -> dict[str, list[Record]]:
    """One panel for every case and input that has errors."""
    compared = [record for record in records if record["rel_l2"] is not None]
    return {
        f"{TITLES.get(case, case)}\n{panel[0]['tokens']} tokens, {name}": panel
        for (case, name), panel in in_order(grouped(compared, "case", "input")).items()
    }


def in_order(groups: dict[tuple[Any, ...], list[Record]]) -> dict[tuple[Any, ...], list[Record]]:
    """Groups whose key begins with a case or model, in the order of TITLES."""
    known = list(TITLES)
    return dict(sorted(groups.items(), key=lambda item: known.index(item[0][0]) if item[0][0] in known else len(known)))


def pareto_front(records: Iterable[Record]) -> list[Record]:
    """Those that no other one beats in both time and error, from fast to slow."""
    front: list[Record] = []
    for record in sorted(records, key=lambda record: (record["ms"], record["rel_l2"])):
        if not front or record["rel_l2"] < front[-1]["rel_l2"]:
            front.append(record)
    return front


def draw_pareto(panels: dict[str, list[Record]], theme: Theme) -> Figure:
    """Error against time; the key takes the place of a panel where one is free."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for index, (axis, (title, records)) in enumerate(zip(axes, panels.items(), strict=False)):
        dress(axis, theme, title)
        axis.set(xscale="log", yscale="log")
        if index % columns == 0:
            axis.set_ylabel("relative L2 error", color=theme.text)
        axis.set_xlabel("milliseconds", color=theme.text)
        numbers(axis.xaxis, "{:g}".format)
        numbers(axis.yaxis, lambda error: f"{error:.2g}")
        axis.margins(0.1, 0.1)
        for (method,), mine in grouped(records, "method").items():
            _plot(axis, method, mine, theme)
    methods = {record["method"] for records in panels.values() for record in records}
    key = [_mark(style) for method, style in STYLES.items() if method in methods]
    key += [_ring(theme), _mark(replace(STYLES["psa"], label="what another of its settings beats"), alpha=0.4)]
    free = axes[len(panels) :]
    for axis in free:
        axis.set_axis_off()
    where = {"loc": "center left"} if free else {"loc": "outside lower center", "ncols": 4}
    (free[0] if free else figure).legend(handles=key, frameon=False, labelcolor=theme.text, fontsize=8.5, **where)
    return figure


def _mark(style: Style, alpha: float = 1.0) -> Line2D:
    look = {"color": style.colour, "marker": style.marker, "markersize": 5, "markeredgewidth": 0, "alpha": alpha}
    return Line2D([], [], linestyle="-" if alpha == 1 else "none", label=style.label, **look)


def _ring(theme: Theme) -> Line2D:
    """What marks the preset that the node starts with."""
    look = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": theme.text}
    return Line2D([], [], linestyle="none", label="PSA, preset balanced", **look)


def _plot(axis: Axes, method: str, records: list[Record], theme: Theme) -> None:
    """Points and front of one method; paler what another of its settings beats."""
    style = STYLES.get(method, Style(method, GREY, "."))
    front = pareto_front(records)
    for record in records:
        axis.plot(
            record["ms"], record["rel_l2"], style.marker, color=style.colour, markersize=5 if method == "psa" else 4.5,
            markeredgewidth=0, alpha=1.0 if record in front else 0.4, zorder=3,
        )  # fmt: skip
        if (method, record["preset"]) == ("psa", "balanced"):
            ring = _ring(theme)
            ring.set_data([record["ms"]], [record["rel_l2"]])
            axis.add_line(ring)
    axis.plot(
        [record["ms"] for record in front], [record["rel_l2"] for record in front],
        color=style.colour, linewidth=2.2 if method == "psa" else 1.3, zorder=2,
    )  # fmt: skip


def draw_tokens(records: list[Record], theme: Theme) -> Figure:
    """Time of one head against the length of the video, by head dim."""
    structured = [record for record in records if record["input"] == "structured"]
    lines = {
        ("cudnn", ""): "-", ("flash", ""): ":", ("psa", FIXED_DENSITY): "-", ("psa", "balanced"): "--",
        ("sol_attn", "tau 1"): "-", ("official", "top-k 1 2 8 skip"): "-", ("flex", "top-k, key blocks of 128"): "-",
    }  # fmt: skip
    dims = sorted({record["head_dim"] for record in structured}, reverse=True)
    figure = Figure(figsize=(4.6 * len(dims), 3.2), layout="constrained")
    for axis, dim in zip(figure.subplots(1, len(dims), squeeze=False).flat, dims, strict=True):
        dress(axis, theme, f"head dim {dim}")
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("tokens", color=theme.text)
        axis.set_ylabel("milliseconds per head", color=theme.text)
        labels = []
        for (method, preset), dash in lines.items():
            mine = [r for r in structured if (r["method"], r["preset"], r["head_dim"]) == (method, preset, dim)]
            mine.sort(key=lambda record: record["tokens"])
            if not mine:
                continue
            style = STYLES[method]
            x, y = [record["tokens"] for record in mine], [record["ms"] / record["heads"] for record in mine]
            axis.plot(x, y, dash, color=style.colour, marker=style.marker, markersize=4.5, markeredgewidth=0)
            text = style.label + (f", {preset}" if method == "psa" else "")
            labels.append(axis.text(1.05 * x[-1], y[-1], text, color=style.colour, fontsize=7.5, va="center"))
        numbers(axis.xaxis, lambda tokens: f"{tokens:,.0f}".replace(",", " "))
        numbers(axis.yaxis, "{:g}".format)
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * (high / low) ** 0.65)  # room for the labels
        figure.draw_without_rendering()
        adjust_text(labels, ax=axis, only_move={"text": "y", "static": "y", "explode": "y", "pull": "y"})
    return figure


def draw_stages(records: list[Record], theme: Theme) -> Figure:
    """PSA's stages at one density, and its peers, as shares of the fastest dense time."""
    structured = [record for record in records if record["input"] == "structured"]
    rows: list[tuple[str, str, Record, float]] = []
    for (case,), of_case in in_order(grouped(structured, "case")).items():
        dense = min((record["ms"] for record in of_case if record["method"] in DENSE), default=None)
        shown = [
            r for r in of_case if r["method"] == "official" or (r["method"], r["preset"]) == ("psa", FIXED_DENSITY)
        ]
        shown.sort(key=lambda record: record["method"] == "psa")
        rows += [(TITLES.get(case, case), f"{dense:.1f} ms dense", record, dense) for record in shown if dense]
    figure = Figure(figsize=(9.2, 0.9 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    dress(axis, theme, "")
    axis.grid(axis="y", visible=False)
    for y, (_, _, record, dense) in enumerate(rows):
        parts = record["stages_ms"] or {"": record["ms"]}
        left = 0.0
        for stage, ms in parts.items():
            colour = STAGES.get(stage, STYLES[record["method"]].colour)
            axis.barh(y, 100 * ms / dense, left=left, color=colour, height=0.62, edgecolor=theme.page, linewidth=0.7)
            left += 100 * ms / dense
        whole = 100 * record["ms"] / dense
        axis.plot([whole, whole], [y - 0.4, y + 0.4], color=theme.text, linewidth=1.5)
        text = f"{STYLES[record['method']].label}: {record['ms']:.1f} ms"
        axis.text(max(left, whole) + 0.7, y, text, color=theme.text, va="center", fontsize=8)
    names = [f"{title}\n{dense}" for title, dense, _, _ in rows]
    once = ["" if y and names[y - 1] == name else name for y, name in enumerate(names)]
    axis.set_yticks(range(len(rows)), once)
    key = [Patch(color=colour, label=f"PSA, {stage}") for stage, colour in STAGES.items()]
    figure.legend(handles=key, loc="outside upper center", ncols=len(key), frameon=False, labelcolor=theme.text)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max((r["ms"] / dense * 100 for _, _, r, dense in rows), default=100))
    axis.set_xlabel(f"% of the fastest dense time; {FIXED_DENSITY}; the stroke is the whole call", color=theme.text)
    return figure


def draw_sampling(records: list[Record], theme: Theme) -> Figure:
    """Seconds of a sampling step, dense and at fixed densities (those of the presets are not a real model's)."""
    usual = [r for r in records if r["vram"] == "normal"]
    shown = [r for r in usual if r["method"] != "psa" or r["preset"].startswith("density")]
    models = in_order(grouped(shown, "model"))
    columns = min(2, len(models))
    rows = math.ceil(len(models) / columns)
    figure = Figure(figsize=(4.6 * columns, 0.6 + 1.5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, ((model,), runs) in zip(axes, models.items(), strict=False):
        dress(axis, theme, TITLES.get(model, model).replace("\n", ", "))
        axis.grid(axis="y", visible=False)
        dense = next((run["seconds_per_step"] for run in runs if run["method"] == "dense"), None)
        for y, run in enumerate(runs):
            seconds = run["seconds_per_step"]
            axis.barh(y, seconds, color=STYLES["psa"].colour if run["method"] == "psa" else GREY, height=0.66)
            faster = f"  {dense / seconds:.2f}x" if dense and run["method"] != "dense" else ""
            axis.text(seconds, y, f" {seconds:.2f} s{faster}", color=theme.text, va="center", fontsize=8)
        names = {"dense": "ComfyUI's default", "dense cudnn": "cuDNN"}
        axis.set_yticks(range(len(runs)), [names.get(r["method"], f"PSA, density {r['density']:.2f}") for r in runs])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.35 * max(run["seconds_per_step"] for run in runs))
    for axis in axes[len(models) :]:
        axis.remove()
    for axis in figure.axes[-columns:]:
        axis.set_xlabel("seconds per step", color=theme.text)
    return figure


if __name__ == "__main__":
    main()
