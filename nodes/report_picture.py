"""The picture of PSA Report. Drawn with Pillow, which ComfyUI needs itself, and the font inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .run_facts import RunFacts
from .run_record import RunRecord
from .words import Words

WIDTH = 1024
"""Width of every picture in pixels."""

_MARGIN, _PLOT_LEFT, _PLOT_RIGHT = 36, 100, WIDTH - 36
_TITLE, _NUMBER, _HEADING, _BODY, _TICK = 30, 28, 19, 17, 15
_MAP_HEIGHT, _ROW_HEIGHT, _SHARES_HEIGHT, _BAR_HEIGHT = 400, 28, 130, 26
_LEAST_KEPT_APART = 12
_MOST_LINES = 6
_LONGEST_WORD = 55
_TICK_STEPS = [factor * 10**power for power in range(6) for factor in (1, 2, 5)]

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of a picture.

    Args:
        ramp: Density 0, 0.5 and 1, and likewise the levels from coarse to fine.
        dense: What stayed dense.
        empty: Where the model was not called.
    """

    background: Color
    panel: Color
    text: Color
    muted: Color
    ramp: tuple[Color, Color, Color]
    dense: Color
    empty: Color

    def density(self, values: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Colours ``[..., 3]`` of densities ``[...]``, 0 to 1."""
        channels = [np.interp(values, (0, 0.5, 1), channel) for channel in zip(*self.ramp, strict=True)]
        return np.stack(channels, axis=-1).round().astype(np.uint8)

    def levels(self, count: int) -> NDArray[np.uint8]:
        """Colours ``[count, 3]`` of the levels, from fine to coarse."""
        return self.density(np.linspace(1, 0, count))


THEMES = {
    "dark": Theme(
        background=(30, 31, 34),
        panel=(42, 44, 48),
        text=(232, 234, 237),
        muted=(160, 166, 174),
        ramp=((30, 58, 95), (66, 133, 200), (205, 230, 255)),
        dense=(196, 144, 60),
        empty=(48, 50, 54),
    ),
    "light": Theme(
        background=(255, 255, 255),
        panel=(243, 245, 248),
        text=(26, 28, 32),
        muted=(96, 103, 112),
        ramp=((214, 231, 247), (74, 143, 208), (12, 44, 90)),
        dense=(228, 178, 82),
        empty=(236, 238, 241),
    ),
}


def draw_run(run: RunRecord, facts: RunFacts, note: str, theme: str) -> Image.Image:
    """Draw the report of a run.

    Args:
        run: The run.
        facts: What its calls add up to.
        note: What the user should know about the choice of preset; empty if nothing.
        theme: One of ``THEMES``.

    Returns:
        An RGB picture, ``WIDTH`` wide and as high as it needs.
    """
    page = _Page(THEMES[theme])
    page.title(run.title, str(run.ending) + (f"  |  {note}" if note else ""))
    if run.unused_cause is not None:
        page.heading("PSA was not used")
        page.paragraph(str(run.unused_cause))
        return page.finish()
    page.tiles(_tiles(run))
    if facts.density.size:
        page.density_map(facts)
        if facts.level_shares.any():
            page.level_chart(facts, [str(level) for level in run.levels])
        for line in run.weights_of_steps():
            page.paragraph(str(line), THEMES[theme].muted)
        page.seconds(facts)
    else:
        page.heading("Calls")
        page.paragraph("No call was recorded: after a failure the device is asked nothing any more.")
    page.heading(f"Sparse calls: {run.sparse_calls}, dense: {run.dense_count}")
    for reason, count in most_first(run.dense_calls):
        page.paragraph(str(Words.of("dense_because", count=count, reason=reason)))
    return page.finish()


def draw_message(title: str, text: str, theme: str) -> Image.Image:
    """Draw a report that has nothing to show but a reason."""
    page = _Page(THEMES[theme])
    page.title(title, "")
    page.paragraph(text)
    return page.finish()


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    speed, label = "-", "speed of attention"
    if (pace := run.pace) is not None:
        named = pace.kind != "as_fast"
        speed = f"{pace.times:.1f}x" if named else "as dense"
        label = f"attention, {pace.kind} than dense" if named else label
    if run.backend == "reference":
        label = "speed: reference is slow"
    return [
        (speed, label),
        ("-" if run.density is None else f"{run.density:.2f}", "mean density, sparse calls"),
        (f"{run.sparse_steps} of {run.steps}", "steps sparse"),
        (str(run.tokens), "tokens"),
    ]


class _Page:
    """A picture that grows downwards while it is drawn."""

    def __init__(self, theme: Theme) -> None:
        self._theme = theme
        self._image = Image.new("RGB", (WIDTH, 4096), theme.background)
        self._draw = ImageDraw.Draw(self._image)
        self._fonts = {size: ImageFont.load_default(size) for size in (_TITLE, _NUMBER, _HEADING, _BODY, _TICK)}
        self._y = _MARGIN

    def finish(self) -> Image.Image:
        return self._image.crop((0, 0, WIDTH, self._y + _MARGIN - 12))

    def title(self, title: str, line: str) -> None:
        self._text(_MARGIN, self._y, title, _TITLE)
        self._text(WIDTH - _MARGIN, self._y + 10, "PSA Report", _BODY, self._theme.muted, "ra")
        self._y += 46
        self.paragraph(line, self._theme.muted)
        self._y += 6

    def heading(self, text: str) -> None:
        self._y += 22
        self._text(_MARGIN, self._y, text, _HEADING)
        self._y += 36

    def paragraph(self, text: str, color: Color | None = None) -> None:
        for line in self._wrapped(text, WIDTH - 2 * _MARGIN):
            self._text(_MARGIN, self._y, line, _BODY, color)
            self._y += 24

    def tiles(self, tiles: list[tuple[str, str]]) -> None:
        """Numbers side by side, each over what it is."""
        gap = 14
        width = (WIDTH - 2 * _MARGIN - gap * (len(tiles) - 1)) // len(tiles)
        for index, (number, label) in enumerate(tiles):
            x = _MARGIN + index * (width + gap)
            self._draw.rounded_rectangle((x, self._y, x + width, self._y + 84), 8, self._theme.panel)
            self._text(x + 16, self._y + 12, number, _NUMBER)
            self._text(x + 16, self._y + 52, label, _TICK, self._theme.muted)
        self._y += 84

    def density_map(self, facts: RunFacts) -> None:
        """Heat map of density, steps to the right and blocks downwards."""
        self.heading("Density of each step and block")
        self._density_legend(self._y - 33)
        blocks, steps = facts.density.shape
        height = min(_MAP_HEIGHT, blocks * _ROW_HEIGHT)
        colors = self._theme.density(np.nan_to_num(facts.density))
        colors[facts.dense] = self._theme.dense
        colors[np.isnan(facts.density)] = self._theme.empty
        rows, columns = _cells(blocks, height), _cells(steps, _PLOT_RIGHT - _PLOT_LEFT)
        picture = colors[rows][:, columns]
        picture[_gaps(rows)] = self._theme.background
        picture[:, _gaps(columns)] = self._theme.background
        self._image.paste(Image.fromarray(picture), (_PLOT_LEFT, self._y))
        every = _tick_step(blocks, height, 22)
        for block in range(0, blocks, every):
            middle = self._y + (block + 0.5) * height / blocks
            self._text(_PLOT_LEFT - 8, middle, str(block), _TICK, self._theme.muted, "rm")
        self._text(_MARGIN, self._y + min(height, _ROW_HEIGHT) / 2, "block", _TICK, self._theme.muted, "lm")
        self._y += height
        self._step_axis(steps)

    def level_chart(self, facts: RunFacts, names: list[str]) -> None:
        """Shares of the levels, stacked for each step under the same axis."""
        self.heading("Block pairs at each level")
        colors = np.vstack([self._theme.dense, self._theme.levels(len(names)), self._theme.empty])
        named = zip(["dense", *names], [None, *facts.level_shares], colors, strict=False)
        items = [(name if share is None else f"{name}: {share:.0%}", color) for name, share, color in named]
        if not facts.dense.any() and not facts.shares[:, -1].any():
            items = items[1:]
        self._legend(self._y - 33, items)
        steps = len(facts.shares)
        columns = _cells(steps, _PLOT_RIGHT - _PLOT_LEFT)
        # From the bottom up: dense calls, then the levels from fine to coarse.
        tops = np.cumsum(np.roll(facts.shares, 1, axis=1), axis=1)
        heights = (np.arange(_SHARES_HEIGHT)[::-1, None, None] + 0.5) / _SHARES_HEIGHT
        kinds = (heights > tops + 1e-9).sum(axis=2)  # [pixel rows, steps]
        picture = colors[kinds][:, columns].astype(np.uint8)
        picture[:, _gaps(columns)] = self._theme.background
        self._image.paste(Image.fromarray(picture), (_PLOT_LEFT, self._y))
        for share in (0, 50, 100):
            y = self._y + _SHARES_HEIGHT * (1 - share / 100)
            self._text(_PLOT_LEFT - 8, y, f"{share}%", _TICK, self._theme.muted, "rm")
        self._y += _SHARES_HEIGHT
        self._step_axis(steps)

    def seconds(self, facts: RunFacts) -> None:
        """Time in attention, as it was and as it would have been dense."""
        self.heading("Seconds in attention")
        sparse = self._theme.ramp[1]
        self._legend(self._y - 33, [("sparse calls", sparse), ("dense calls", self._theme.dense)])
        bars = [("this run", [(facts.sparse_seconds, sparse), (facts.dense_seconds, self._theme.dense)])]
        if facts.estimate is not None:
            bars.append(("all dense, estimated", [(facts.estimate + facts.dense_seconds, self._theme.dense)]))
        left, right = _MARGIN + 180, _PLOT_RIGHT - 90
        scale = (right - left) / max(*(sum(seconds for seconds, _ in parts) for _, parts in bars), 1e-9)
        for name, parts in bars:
            self._text(_MARGIN, self._y + _BAR_HEIGHT / 2, name, _BODY, anchor="lm")
            x = float(left)
            for seconds, color in parts:
                if seconds:
                    self._draw.rectangle((x, self._y, x + seconds * scale, self._y + _BAR_HEIGHT), color)
                x += seconds * scale
            total = sum(seconds for seconds, _ in parts)
            self._text(x + 10, self._y + _BAR_HEIGHT / 2, f"{seconds_text(total)} s", _BODY, anchor="lm")
            self._y += _BAR_HEIGHT + 10
        if facts.unmatched:
            self.paragraph(
                f"No estimate of the time without PSA: {facts.unmatched} sparse calls are of a size at which no dense "
                "call was timed.",
                self._theme.muted,
            )

    def _density_legend(self, y: int) -> None:
        width, x = 150, _PLOT_RIGHT - 150 - 14
        ramp = self._theme.density(np.tile(np.linspace(0, 1, width), (14, 1)))
        self._image.paste(Image.fromarray(ramp), (x, y + 3))
        self._text(x - 8, y + 10, "density 0", _TICK, self._theme.muted, "rm")
        self._text(x + width + 6, y + 10, "1", _TICK, self._theme.muted, "lm")
        self._legend(y, [("dense", self._theme.dense)], right=x - 96)

    def _legend(self, y: int, items: list[tuple[str, Any]], right: int = _PLOT_RIGHT) -> None:
        """Squares with names, flush right."""
        for name, color in reversed(items):
            self._text(right, y + 10, name, _TICK, self._theme.muted, "rm")
            right -= round(self._fonts[_TICK].getlength(name)) + 20
            self._draw.rectangle((right, y + 3, right + 13, y + 16), tuple(int(channel) for channel in color))
            right -= 16

    def _step_axis(self, steps: int) -> None:
        width = _PLOT_RIGHT - _PLOT_LEFT
        every = _tick_step(steps, width, 44)
        for step in sorted({1, *range(every, steps + 1, every)}):
            middle = _PLOT_LEFT + (step - 0.5) * width / steps
            self._text(middle, self._y + 6, str(step), _TICK, self._theme.muted, "ma")
        self._text(_MARGIN, self._y + 6, "step", _TICK, self._theme.muted)
        self._y += 24

    def _text(self, x: float, y: float, text: str, size: int, color: Color | None = None, anchor: str = "la") -> None:
        self._draw.text((x, y), _printable(text), color or self._theme.text, self._fonts[size], anchor)

    def _wrapped(self, text: str, width: int) -> list[str]:
        """Lines no wider than that; what is too long for a few of them is cut."""
        length = self._fonts[_BODY].getlength
        lines: list[str] = []
        for word in _printable(text).split():
            if lines and length(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                continue
            while length(word) > width:  # a path, say
                lines.append(word[:_LONGEST_WORD])
                word = word[_LONGEST_WORD:]
            lines.append(word)
        return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "..."]


def most_first(counts: Mapping[Words, int]) -> list[tuple[Words, int]]:
    """Reasons and how often, the most frequent first."""
    return sorted(counts.items(), key=lambda item: -item[1])


def seconds_text(seconds: float) -> str:
    """A number of seconds with a reasonable number of digits."""
    return f"{seconds:.{0 if seconds >= 100 else 1 if seconds >= 10 else 2 if seconds >= 0.1 else 4}f}"


def _printable(text: str) -> str:
    return text.encode("ascii", "replace").decode()  # the font has little else


def _cells(count: int, pixels: int) -> NDArray[np.intp]:
    """Which of so many cells each pixel of an axis shows."""
    return np.arange(pixels) * count // pixels


def _gaps(cells: NDArray[np.intp]) -> NDArray[np.bool_]:
    """First pixel of each cell but the first, where cells are large enough to be kept apart."""
    gaps = np.diff(cells, prepend=cells[0]) > 0
    return gaps if len(cells) >= _LEAST_KEPT_APART * (cells[-1] + 1) else np.zeros_like(gaps)


def _tick_step(count: int, pixels: float, apart: float) -> int:
    """Smallest round number of cells that are at least so many pixels."""
    return next(step for step in _TICK_STEPS if step * pixels >= apart * count)
