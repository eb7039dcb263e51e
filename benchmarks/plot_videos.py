"""PSNR of whole videos against the attention work and the time that they took."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.plot_style import GREY, STYLES, Style, Theme, dress
from benchmarks.results_file import Record
from benchmarks.trade_off import Point, points_of

MAIN_STEPS = 30
FLOOR = "flash"  # another dense kernel: as alike as rounding lets two videos be
COLOURS = ("#2b87e3", "#d99a00", "#9a7ad6", "#dd5f1c", "#c973ae", "#5aa9a3", "#8a6d3b", "#4b5fc1")
MARKERS = "osDvP^Xh"

Cases = dict[tuple[str, int, int], list[Record]]


def main_case(cases: Cases) -> Cases:
    """The longest video of every model, at the usual number of steps where there are such."""
    chosen: Cases = {}
    for model in dict.fromkeys(model for model, _, _ in cases):
        mine = [key for key in cases if key[0] == model]
        key = max(mine, key=lambda key: (key[2] == MAIN_STEPS, key[1]))
        chosen[key] = cases[key]
    return chosen


def draw_videos(cases: Cases, theme: Theme) -> Figure:
    """A row for every case: against work, and against seconds of sampling, where Sol-Attn can be shown too."""
    points = {case: points_of(records) for case, records in cases.items()}
    styles = style_families([point for mine in points.values() for point in mine])
    rows = len(cases)
    figure = Figure(figsize=(9.2, 0.9 + 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for line, ((model, tokens, steps), mine) in zip(axes, points.items(), strict=True):
        dense = next((r["seconds"] for r in cases[model, tokens, steps] if r["method"] == "dense"), None)
        for axis, x_of in zip(line, ("work", "seconds"), strict=True):
            dress(axis, theme, f"{model} model, {tokens} tokens, {steps} steps" + _floor(mine))
            _plot(axis, mine, x_of, styles, theme)
            axis.set_ylabel("PSNR against dense, dB", color=theme.text)
        line[0].set_xlabel("attention work, dense = 1", color=theme.text)
        line[1].set_xlabel("seconds of sampling" + (f", dense {dense:.2f}" if dense else ""), color=theme.text)
        if dense:
            line[1].axvline(dense, color=GREY, linewidth=1, linestyle=":")
    key = [
        Line2D([], [], color=style.colour, marker=style.marker, markersize=5, markeredgewidth=0, label=style.label)
        for style in styles.values()
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=3, frameon=False, labelcolor=theme.text, fontsize=8)
    return figure


def style_families(points: Sequence[Point]) -> dict[str, Style]:
    """A look for every family of several points; single ones, such as presets, are named where they stand."""
    methods: dict[str, set[str]] = {}
    for point in points:
        methods.setdefault(point.family, set()).add(point.method)
    looks = cycle(zip(COLOURS, MARKERS, strict=True))
    styles = {}
    for family, names in methods.items():
        if len(names) > 1:
            peer = next((style for style in STYLES.values() if family == style.label), None)
            styles[family] = peer or Style(family, *next(looks))
    return styles


def _plot(axis: Axes, points: list[Point], x_of: str, styles: dict[str, Style], theme: Theme) -> None:
    """Curves of families, and single points with their names."""
    shown = [point for point in points if getattr(point, x_of) is not None and point.family != FLOOR]
    axis.margins(0.2, 0.08)  # room for the names
    for family in dict.fromkeys(point.family for point in shown):
        mine = sorted((getattr(point, x_of), point.psnr) for point in shown if point.family == family)
        x, y = zip(*mine, strict=True)
        if family in styles:
            style = styles[family]
            axis.plot(x, y, color=style.colour, marker=style.marker, markersize=4.5, markeredgewidth=0, linewidth=1.5)
        else:
            axis.plot(x, y, "*", color=theme.text, markersize=7, markeredgewidth=0, zorder=4)
            axis.annotate(family, (x[0], y[0]), (4, 3), textcoords="offset points", color=theme.text, fontsize=7)


def _floor(points: list[Point]) -> str:
    """How alike two dense kernels are, for a title: far above the other points, where it exists."""
    floor = next((point.psnr for point in points if point.family == FLOOR), None)
    return "" if floor is None else f"\n(another dense kernel: {floor:.0f} dB)"
