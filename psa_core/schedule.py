"""When a model runs sparse: the part of the sampling, the blocks that stay dense, the least length."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_TOKENS = 2**31 - 1
_BLOCK_RANGE = re.compile(r"(-?\d{1,4})(?:\s*-\s*(-?\d{1,4}))?")


@dataclass(frozen=True)
class BlockList:
    """Transformer blocks, named before the number of blocks is known.

    Args:
        ranges: ``(first, last)`` pairs, both included; a negative index counts from the end, -1 is the last block.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> BlockList:
        """Read a list such as ``"0, 1, 38-39, -1"``; an empty text names no block.

        Raises:
            ValueError: naming the part that is neither an index nor a range.
        """
        if not isinstance(text, str):
            raise ValueError(f"dense_blocks: {text!r} is not text such as '0, 1, 38-39, -1'")
        if not text.strip():
            return cls()
        ranges = []
        for part in map(str.strip, text.split(",")):
            match = _BLOCK_RANGE.fullmatch(part)
            if match is None:
                raise ValueError(
                    f"dense_blocks: {part!r} in {text!r} is neither a block (0; -1 is the last) nor a range (38-39); "
                    "separate them with commas"
                )
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            if (first < 0) == (last < 0) and first > last:
                raise ValueError(f"dense_blocks: range {part!r} runs backwards; write the lower block first")
            ranges.append((first, last))
        return cls(tuple(ranges))

    def resolve(self, count: int) -> frozenset[int]:
        """Indices, from 0, of the named blocks in a model of ``count`` blocks.

        Raises:
            ValueError: a block that the model does not have, or a range that runs backwards in it.
        """
        blocks: set[int] = set()
        for bounds in self.ranges:
            for index in bounds:
                if not -count <= index < count:
                    raise ValueError(
                        f"dense_blocks: {index} is not a block of this model, which has {count} "
                        f"(0 to {count - 1}, or -{count} to -1 from the end)"
                    )
            first, last = (index % count for index in bounds)
            if first > last:
                raise ValueError(
                    f"dense_blocks: range {_range_text(bounds)!r} runs backwards in a model of {count} blocks"
                )
            blocks.update(range(first, last + 1))
        return frozenset(blocks)

    def __str__(self) -> str:
        return ", ".join(map(_range_text, self.ranges))


@dataclass(frozen=True)
class Schedule:
    """Where in a sampling run, and in which calls, attention is sparse.

    Args:
        start_percent: Share of the sampling after which attention turns sparse, from 0 to 1.
        end_percent: Share of the sampling after which it is dense again, above ``start_percent``, at most 1.
        dense_blocks: Transformer blocks that stay dense.
        min_tokens: Sequences shorter than this many tokens stay dense; at most ``MAX_TOKENS``.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_blocks: BlockList = field(default_factory=BlockList)
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("start_percent", "end_percent"):
            if not _is_fraction(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a number from 0 to 1")
        if self.start_percent >= self.end_percent:
            raise ValueError(f"start_percent: {self.start_percent} is not below end_percent, {self.end_percent}")
        if not isinstance(self.dense_blocks, BlockList):
            raise ValueError(f"dense_blocks: {self.dense_blocks!r} is not a BlockList")
        whole = isinstance(self.min_tokens, int) and not isinstance(self.min_tokens, bool)
        if not whole or not 0 <= self.min_tokens <= MAX_TOKENS:
            raise ValueError(f"min_tokens: {self.min_tokens!r} is not a whole number of tokens from 0 to {MAX_TOKENS}")


def _range_text(bounds: tuple[int, int]) -> str:
    first, last = bounds
    return str(first) if first == last else f"{first}-{last}"


def _is_fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1  # as NaN is not
