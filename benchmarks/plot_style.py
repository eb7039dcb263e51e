"""How the pictures of results look: methods, pages, axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.results_file import Record


@dataclass(frozen=True)
class Style:
    """How a method looks; colours tell apart for the colour-blind and read on white and on black."""

    label: str
    colour: str
    marker: str


GREY = "#858b93"
STYLES = {
    "cudnn": Style("cuDNN, dense", GREY, "s"),
    "flash": Style("FlashAttention, dense", GREY, "D"),
    "psa": Style("PSA for ComfyUI", "#2b87e3", "o"),
    "sol_attn": Style("Sol-Attn", "#0fa37c", "^"),
    "official": Style("official PSA", "#dd5f1c", "X"),
    "flex": Style("FlexAttention", "#d99a00", "v"),
    "sage": Style("SageAttention, dense", "#c973ae", "P"),
    "int8_attention": Style("int8, dense", "#9a7ad6", "h"),
}


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    text: str
    grid: str
    page: str


THEMES = (Theme("light", "#1f2328", "#d9dee4", "#ffffff"), Theme("dark", "#e6edf3", "#343b44", "#0d1117"))


def dress(axis: Axes, theme: Theme, title: str) -> None:
    """A quiet frame in a theme's colours."""
    axis.set_facecolor("none")
    axis.set_title(title, color=theme.text, fontsize=8.5)
    axis.tick_params(colors=theme.text, which="both", length=0)
    axis.grid(color=theme.grid, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)


def numbers(axis: Any, text: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def grouped(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records that agree in these entries, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in names)].append(record)
    return dict(groups)
