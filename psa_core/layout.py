"""Where the videos are in a token sequence, and what must stay exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Grid = tuple[int, int, int]
"""Tokens along ``(time, height, width)``."""


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of tokens that holds a video, or several.

    A video's tokens are contiguous and in raster order (time, then height, then width). Every token outside the
    videos (text, reference or appended tokens, at either end or between them) is *exact*: as a key it is attended at
    full resolution by every query, as a query it attends every key at full resolution. So are the tokens of
    ``exact_spans``, which may lie inside a video as well.

    Args:
        grid: Tokens of the first video along ``(time, height, width)``.
        video_start: Index of its first token.
        tokens: Tokens in the whole sequence; by default the last video ends the sequence.
        exact_spans: Further ``(start, stop)`` ranges of token indices that stay exact.
        more_videos: Further videos as ``(start, grid)``, each after the one before.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """

    grid: Grid
    video_start: int = 0
    tokens: int = -1
    exact_spans: tuple[tuple[int, int], ...] = ()
    more_videos: tuple[tuple[int, Grid], ...] = ()

    def __post_init__(self) -> None:
        if not _is_grid(self.grid):
            raise ValueError(f"grid: {self.grid!r} is not three whole numbers (time, height, width) from 1 up")
        if not _is_count(self.video_start) or self.video_start < 0:
            raise ValueError(f"video_start: {self.video_start!r} is not a whole number from 0 up")
        end = self.video_start + math.prod(self.grid)
        for video in self.more_videos:
            if len(video) != 2 or not _is_count(video[0]) or video[0] < end or not _is_grid(video[1]):
                raise ValueError(f"more_videos: {video!r} is not a (start, grid) with start from {end} up")
            end = video[0] + math.prod(video[1])
        if self.tokens == -1:
            object.__setattr__(self, "tokens", end)
        if not _is_count(self.tokens) or self.tokens < end:
            raise ValueError(
                f"tokens: {self.tokens!r} is less than {end}, where the {'last ' * bool(self.more_videos)}video ends"
            )
        for span in self.exact_spans:
            if len(span) != 2 or not all(map(_is_count, span)) or not 0 <= span[0] < span[1] <= self.tokens:
                raise ValueError(
                    f"exact_spans: {span!r} is not a (start, stop) with 0 <= start < stop <= {self.tokens}"
                )

    @property
    def videos(self) -> tuple[tuple[int, Grid], ...]:
        """Every video as ``(start, grid)``, in the order of the sequence."""
        return ((self.video_start, self.grid), *self.more_videos)

    @property
    def video_tokens(self) -> int:
        """Tokens of all videos, exact ones included."""
        return sum(math.prod(grid) for _, grid in self.videos)


def _is_grid(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(_is_count(n) and n >= 1 for n in value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
