"""Where the video is in a token sequence, and what must stay exact."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of tokens that holds one video.

    The video's tokens are contiguous and in raster order (time, then height, then width). Every token outside the
    video (text, reference or appended tokens) is *exact*: as a key it is attended at full resolution by every query,
    as a query it attends every key at full resolution. So are the tokens of ``exact_spans``, which may lie inside
    the video as well.

    Args:
        grid: Tokens of the video along ``(time, height, width)``.
        video_start: Index of the first video token.
        tokens: Tokens in the whole sequence; by default the video ends the sequence.
        exact_spans: Further ``(start, stop)`` ranges of token indices that stay exact.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """

    grid: tuple[int, int, int]
    video_start: int = 0
    tokens: int = -1
    exact_spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or not all(_is_count(n) and n >= 1 for n in self.grid):
            raise ValueError(f"grid: {self.grid!r} is not three whole numbers (time, height, width) from 1 up")
        if not _is_count(self.video_start) or self.video_start < 0:
            raise ValueError(f"video_start: {self.video_start!r} is not a whole number from 0 up")
        end = self.video_start + self.video_tokens
        if self.tokens == -1:
            object.__setattr__(self, "tokens", end)
        if not _is_count(self.tokens) or self.tokens < end:
            raise ValueError(f"tokens: {self.tokens!r} is less than {end}, where the video ends")
        for span in self.exact_spans:
            if len(span) != 2 or not all(map(_is_count, span)) or not 0 <= span[0] < span[1] <= self.tokens:
                raise ValueError(
                    f"exact_spans: {span!r} is not a (start, stop) with 0 <= start < stop <= {self.tokens}"
                )

    @property
    def video_tokens(self) -> int:
        """Tokens of the video, exact ones included."""
        t, h, w = self.grid
        return t * h * w


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
