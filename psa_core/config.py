"""What a sparse attention call is asked to do: one frozen record, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Level = int | Literal["block", "skip"]
Selection = Literal["error", "topk", "threshold"]
Order = Literal["gilbert", "tile", "raster"]

POOLED_LEVELS = (1, 2, 4, 8)
QUERY_BLOCKS = (64, 128)
KEY_BLOCKS = (32, 64, 128)
IMPORTANCE_STRIDES = (1, 2, 4, 8, 16)
IMPORTANCE_GROUPS = (8, 16, 32, 64, 128)
SKIP_CODE = 255
MAX_TILE_EXTENT = 64
MAX_ERROR_WEIGHT = 1e6


@dataclass(frozen=True)
class PSAConfig:
    """Settings of one pyramid sparse attention call.

    A *level* is the number of neighbouring tokens averaged into one key: 1 is exact, ``"block"`` a whole key block
    in one token, ``"skip"`` leaves the block out. Levels are listed from fine to coarse.

    Args:
        selection: ``error`` picks the level with the least predicted error plus weighted cost; ``topk`` goes by the
            rank of a block's importance, ``threshold`` by the importance that ranks before it.
        levels: Levels in use, from fine to coarse. ``error`` needs level 1 and cannot skip.
        error_weight: Quality knob of ``error``, dimensionless; larger is cheaper, 0 is dense.
        ranges: For ``topk`` and ``threshold``: one ``(low, high)`` fraction per level, ascending from 0 to 1.
        similarity_caps: For ``topk`` and ``threshold``: one ``(level, least similarity)`` per pooled level, from fine
            to coarse. A key block is pooled no coarser than the coarsest of these levels at which the cosine of a
            group's first and last key is, in the mean over its groups, above that; None for no such limit.
        group_keys: Sort the keys of every block by content before they are averaged, so that what is averaged is
            alike. Not together with ``similarity_caps``, which look at neighbours in the curve's order.
        variance_term: Add the clamped second-order term to pooled logits.
        order: Curve along which video tokens are laid out before they are cut into blocks.
        tile: Extent ``(t, h, w)`` in tokens of a tile, for ``order="tile"`` only (4x4x4 when not given).
        query_block: Rows of a query block, in tokens.
        key_block: Rows of a key block, in tokens.
        importance_group: Keys whose mean stands for them where the importance is estimated, a divisor of ``key_block``;
            a whole key block when not given.
        importance_stride: Every how many query rows the importance is estimated from.
        workspace_mib: Upper bound of a call's temporary memory, in MiB: what it needs beyond its inputs and its output.
            As many heads as fit are processed at a time.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.

    Source: PSA, arXiv:2512.04025; error-aware levels are this project's own.
    """

    selection: Selection = "error"
    levels: tuple[Level, ...] = (1, 2, 4, 8, "block")
    error_weight: float | None = None
    ranges: tuple[tuple[float, float], ...] | None = None
    similarity_caps: tuple[tuple[int, float], ...] | None = None
    group_keys: bool = False
    variance_term: bool = True
    order: Order = "gilbert"
    tile: tuple[int, int, int] | None = None
    query_block: int = 128
    key_block: int = 64
    importance_group: int | None = None
    importance_stride: int = 4
    workspace_mib: int = 512

    def __post_init__(self) -> None:
        _one_of("selection", self.selection, get_args(Selection))
        _one_of("order", self.order, get_args(Order))
        _one_of("query_block", self.query_block, QUERY_BLOCKS)
        _one_of("key_block", self.key_block, KEY_BLOCKS)
        if self.importance_group is not None:
            allowed = tuple(size for size in IMPORTANCE_GROUPS if size <= self.key_block)
            _one_of("importance_group", self.importance_group, allowed)
        _one_of("importance_stride", self.importance_stride, IMPORTANCE_STRIDES)
        for name in ("group_keys", "variance_term"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not true or false")
        if not _is_int(self.workspace_mib) or self.workspace_mib < 1:
            raise ValueError(f"workspace_mib: {self.workspace_mib!r} is not a whole number of MiB from 1 up")
        self._check_levels()
        self._check_tile()
        if self.selection == "error":
            self._check_error_selection()
        else:
            self._check_ranked_selection()

    @property
    def importance_parts(self) -> int:
        """Groups of keys into which the importance cuts a key block."""
        return self.key_block // (self.importance_group or self.key_block)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """Tile extent in use, in tokens."""
        return self.tile or (4, 4, 4)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Tokens per group of every level in use, from fine to coarse; a skipped block has none and is left out."""
        return tuple(self.key_block if level == "block" else int(level) for level in self.levels if level != "skip")

    @property
    def level_codes(self) -> tuple[int, ...]:
        """Code of every level in use: log2 of its group size, 255 for skip."""
        return tuple(level_code(level, self.key_block) for level in self.levels)

    def _check_levels(self) -> None:
        if not isinstance(self.levels, tuple) or not self.levels:
            raise ValueError(f"levels: {self.levels!r} is not a non-empty tuple of 1, 2, 4, 8, 'block', 'skip'")
        for level in self.levels:
            named = isinstance(level, str) and level in ("block", "skip")
            if not named and not (_is_int(level) and level in POOLED_LEVELS):
                raise ValueError(f"levels: {level!r} is not one of 1, 2, 4, 8, 'block', 'skip'")
        codes = [level_code(level, self.key_block) for level in self.levels]
        if codes != sorted(set(codes)):
            raise ValueError(f"levels: {self.levels!r} are not listed once each from fine to coarse")
        if self.levels[0] == "skip":
            raise ValueError("levels: skip cannot be the only level")

    def _check_tile(self) -> None:
        if self.tile is None:
            return
        if self.order != "tile":
            raise ValueError(f"tile: {self.tile!r} has no meaning with order {self.order!r}, only with 'tile'")
        right = isinstance(self.tile, tuple) and len(self.tile) == 3
        if not right or not all(_is_int(n) and 1 <= n <= MAX_TILE_EXTENT for n in self.tile):
            raise ValueError(f"tile: {self.tile!r} is not three whole numbers (t, h, w) from 1 to {MAX_TILE_EXTENT}")

    def _check_error_selection(self) -> None:
        weight = self.error_weight
        if not _is_number(weight) or not 0 <= weight <= MAX_ERROR_WEIGHT:  # type: ignore[operator]
            raise ValueError(f"error_weight: {weight!r} is not a number from 0 (dense) to 1e6")
        if 1 not in self.levels or "skip" in self.levels:
            raise ValueError(f"levels: {self.levels!r}; selection 'error' needs level 1 and cannot skip")
        if self.ranges is not None:
            raise ValueError(f"ranges: {self.ranges!r} have no meaning with selection 'error'")
        if self.similarity_caps is not None:
            raise ValueError(f"similarity_caps: {self.similarity_caps!r} have no meaning with selection 'error'")

    def _check_ranked_selection(self) -> None:
        if self.error_weight is not None:
            raise ValueError(f"error_weight: {self.error_weight!r} has no meaning with selection {self.selection!r}")
        if not isinstance(self.ranges, tuple) or len(self.ranges) != len(self.levels):
            raise ValueError(f"ranges: {self.ranges!r} is not one (low, high) for each of the levels {self.levels!r}")
        edge = 0.0
        for level, bounds in zip(self.levels, self.ranges, strict=True):
            if not isinstance(bounds, tuple) or len(bounds) != 2 or not all(_is_number(x) for x in bounds):
                raise ValueError(f"ranges: {bounds!r} of level {level!r} is not a pair of numbers (low, high)")
            low, high = bounds
            if low != edge or not low < high <= 1:
                raise ValueError(
                    f"ranges: level {level!r} has [{low}, {high}); ranges ascend without gap or overlap from 0 to 1, "
                    f"so it must begin at {edge:g} and end above that, at most at 1"
                )
            edge = high
        if edge != 1:
            raise ValueError(f"ranges: the last one ends at {edge:g}, not at 1")
        self._check_similarity_caps()

    def _check_similarity_caps(self) -> None:
        caps = self.similarity_caps
        if caps is None:
            return
        if self.group_keys:
            raise ValueError("group_keys: True does not go with similarity_caps, which look at neighbours on the curve")
        if 1 not in self.levels or "block" in self.levels:
            raise ValueError(f"levels: {self.levels!r}; similarity_caps need level 1 and do not know 'block'")
        pooled = tuple(level for level in self.levels if level in POOLED_LEVELS[1:])
        pairs = isinstance(caps, tuple) and all(isinstance(cap, tuple) and len(cap) == 2 for cap in caps)
        if not pairs or tuple(level for level, _ in caps) != pooled:
            raise ValueError(
                f"similarity_caps: {caps!r} is not one (level, least similarity) for each of the pooled levels "
                f"{pooled!r}"
            )
        for level, similarity in caps:
            if not _is_number(similarity) or not -1 <= similarity <= 1:
                raise ValueError(f"similarity_caps: {similarity!r} of level {level} is not a cosine from -1 to 1")


def level_code(level: Level, key_block: int) -> int:
    """Code of a level: log2 of its group size in tokens, 255 for skip."""
    if level == "skip":
        return SKIP_CODE
    size = key_block if level == "block" else int(level)
    return size.bit_length() - 1


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    # a whole number may be too large for isfinite
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(str, allowed))}")
