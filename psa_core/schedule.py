"""When a model runs sparse, and how sparse: by the part of the sampling, the transformer block, the length."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

MAX_TOKENS = 2**31 - 1
MAX_RAMP = 4.0
MAX_BLOCK_WEIGHT = 1e3
RAMP_FLOOR = 1 / 64
"""Share of the sampling that a ramp begins with: the first step, at 0, would be exact else, and its time wasted."""

Stacks: TypeAlias = tuple[tuple[str, int], ...]
"""Name and number of blocks of each of a model's stacks, the main one first; blocks are numbered through."""

_PERCENT_BITS = 32
_NAMED_STACK = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*:(.*)", re.DOTALL)
_BLOCK_RANGE = re.compile(r"(-?\d{1,4})(?:\s*-\s*(-?\d{1,4}))?")


@dataclass(frozen=True)
class BlockList:
    """Transformer blocks, named before the number of blocks is known.

    Args:
        ranges: ``(first, last)`` pairs, both included; a negative index counts from the end, -1 is the last block.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str, parameter: str = "dense_blocks") -> BlockList:
        """Read a list such as ``"0, 1, 38-39, -1"``; an empty text names no block.

        Args:
            text: The list.
            parameter: What errors call it.

        Raises:
            ValueError: naming the part that is neither an index nor a range.
        """
        if not isinstance(text, str):
            raise ValueError(f"{parameter}: {text!r} is not text such as '0, 1, 38-39, -1'")
        if not text.strip():
            return cls()
        ranges = []
        for part in map(str.strip, text.split(",")):
            match = _BLOCK_RANGE.fullmatch(part)
            if match is None:
                raise ValueError(
                    f"{parameter}: {part!r} in {text!r} is neither a block (0; -1 is the last) nor a range (38-39); "
                    "separate them with commas"
                )
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            if (first < 0) == (last < 0) and first > last:
                raise ValueError(f"{parameter}: range {part!r} runs backwards; write the lower block first")
            ranges.append((first, last))
        return cls(tuple(ranges))

    def resolve(self, count: int, parameter: str = "dense_blocks") -> frozenset[int]:
        """Indices, from 0, of the named blocks in a model of ``count`` blocks.

        Args:
            count: The model's blocks.
            parameter: What errors call the list.

        Raises:
            ValueError: a block that the model does not have, or a range that runs backwards in it.
        """
        blocks: set[int] = set()
        for bounds in self.ranges:
            for index in bounds:
                if not -count <= index < count:
                    raise ValueError(
                        f"{parameter}: {index} is not a block of this model, which has {count} "
                        f"(0 to {count - 1}, or -{count} to -1 from the end)"
                    )
            first, last = (index % count for index in bounds)
            if first > last:
                raise ValueError(
                    f"{parameter}: range {_range_text(bounds)!r} runs backwards in a model of {count} blocks"
                )
            blocks.update(range(first, last + 1))
        return frozenset(blocks)

    def __str__(self) -> str:
        return ", ".join(map(_range_text, self.ranges))


@dataclass(frozen=True)
class BlockWeights:
    """Factors on the error weight in some transformer blocks, named before the number of blocks is known.

    Args:
        factors: Stack, blocks of it, and their factor, from 0 (exact) to ``MAX_BLOCK_WEIGHT``. The stack's name is
            empty for the model's main one.
    """

    factors: tuple[tuple[str, BlockList, float], ...] = ()

    @classmethod
    def parse(cls, named: object) -> BlockWeights:
        """Read a mapping such as ``{"0, 3-5": 0.3, "vace: 0": 0.5}``; an empty one leaves all blocks alike.

        Raises:
            ValueError: naming the entry that is no block list with a factor.
        """
        if not isinstance(named, Mapping):
            raise ValueError(
                f"block_weights: {named!r} is not a mapping of blocks to factors such as {{'0, 3-5': 0.3}}"
            )
        factors: dict[str, tuple[str, BlockList, float]] = {}
        for key, factor in named.items():
            text = str(key) if type(key) is int else key  # YAML reads a lone index as a number
            match = _NAMED_STACK.fullmatch(text) if isinstance(text, str) else None
            stack, listed = (match[1], match[2].strip()) if match else ("", text)
            blocks = BlockList.parse(listed, "block_weights")
            if not blocks.ranges:
                raise ValueError(f"block_weights: {text!r} names no block")
            if not _is_number(factor) or not 0 <= factor <= MAX_BLOCK_WEIGHT:
                raise ValueError(
                    f"block_weights: {factor!r} of {text!r} is not a number from 0 (exact) to {MAX_BLOCK_WEIGHT:g}"
                )
            if factors.setdefault(_entry_text(stack, blocks), entry := (stack, blocks, factor)) is not entry:
                raise ValueError(f"block_weights: {text!r} is named twice")
        return cls(tuple(factors.values()))

    def resolve(self, stacks: Stacks) -> dict[int, float]:
        """The factors by the number of their block; blocks that are not named have none.

        Args:
            stacks: The model's.

        Raises:
            ValueError: a stack or block that the model does not have, or a block that is named twice.
        """
        found: dict[int, float] = {}
        for stack, blocks, factor in self.factors:
            first, size = _place(stack, stacks)
            for index in sorted(blocks.resolve(size, "block_weights")):
                if first + index in found:
                    raise ValueError(f"block_weights: block {index} of {_entry_text(stack, blocks)!r} is named twice")
                found[first + index] = factor
        return found

    def named(self) -> dict[str, float]:
        """The mapping that ``parse`` reads."""
        return {_entry_text(stack, blocks): factor for stack, blocks, factor in self.factors}

    def __bool__(self) -> bool:
        return bool(self.factors)


@dataclass(frozen=True)
class Schedule:
    """Where in a sampling run, and in which calls, attention is sparse, and how the error weight varies among them.

    Args:
        start_percent: Share of the sampling after which attention turns sparse, from 0 to 1.
        end_percent: Share of the sampling after which it is dense again, above ``start_percent``, at most 1.
        dense_blocks: Transformer blocks that stay dense.
        min_tokens: Sequences shorter than this many tokens stay dense; at most ``MAX_TOKENS``.
        ramp: How the error weight grows with the share of the sampling that is done, whose power it is multiplied
            by: 0 for one weight throughout, 1 for one that grows in proportion, at most ``MAX_RAMP``.
        block_weights: Factors on the error weight in some transformer blocks; the others take 1.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_blocks: BlockList = field(default_factory=BlockList)
    min_tokens: int = 0
    ramp: float = 0.0
    block_weights: BlockWeights = field(default_factory=BlockWeights)

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
        if not _is_number(self.ramp) or not 0 <= self.ramp <= MAX_RAMP:
            raise ValueError(f"ramp: {self.ramp!r} is not a number from 0 (one weight throughout) to {MAX_RAMP:g}")
        if not isinstance(self.block_weights, BlockWeights):
            raise ValueError(f"block_weights: {self.block_weights!r} is not a BlockWeights")

    @property
    def varies(self) -> bool:
        """Whether the error weight differs between steps or blocks."""
        return bool(self.ramp or self.block_weights)

    def weight_at(self, percent: float, block: int | None = None, stacks: Stacks = ()) -> float:
        """Factor on the error weight of a call: ``max(percent, 1/64) ** ramp``, times that of its block.

        Args:
            percent: Share of the whole sampling that is done, from 0 to 1, whatever part of it this run takes.
            block: Number of the transformer block; needed where ``block_weights`` name any.
            stacks: The model's, likewise.

        Raises:
            ValueError: ``block_weights`` do not fit the model.
        """
        factor: float = max(percent, RAMP_FLOOR) ** self.ramp
        if self.block_weights and block is not None:
            factor *= self.block_weights.resolve(stacks).get(block, 1.0)
        return factor


def percent_at(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """Share of the sampling that is done at a noise level, from 0 to 1.

    Args:
        sigma: The noise level.
        percent_to_sigma: The running model's own; it never rises.
    """
    low, high = 0.0, 1.0
    for _ in range(_PERCENT_BITS):
        middle = (low + high) / 2
        if percent_to_sigma(middle) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _place(stack: str, stacks: Stacks) -> tuple[int, int]:
    """Number of the first block of a stack, and its size."""
    first = 0
    for name, size in stacks:
        if stack in ("", name):
            return first, size
        first += size
    names = ", ".join(name for name, _ in stacks)
    raise ValueError(f"block_weights: {stack or 'the main stack'!r} is not a stack of this model, which has {names}")


def _entry_text(stack: str, blocks: BlockList) -> str:
    return f"{stack}: {blocks}" if stack else str(blocks)


def _range_text(bounds: tuple[int, int]) -> str:
    first, last = bounds
    return str(first) if first == last else f"{first}-{last}"


def _is_fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1  # as NaN is not


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
