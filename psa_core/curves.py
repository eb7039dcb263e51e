"""Orders of a 3-D grid in which neighbours along the curve are neighbours in the video."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.int32]  # [n, 3] coordinates along the three axes of a box


def raster_curve(grid: tuple[int, int, int]) -> NDArray[np.int64]:
    """Raster indices in raster order: the identity ``[T*H*W]``."""
    return np.arange(grid[0] * grid[1] * grid[2], dtype=np.int64)


def tile_curve(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> NDArray[np.int64]:
    """Raster indices tile after tile, both in raster order; tiles at the far edges are cut off ``[T*H*W]``."""
    coordinates = np.indices(grid).reshape(3, -1)
    keys = [axis // extent for axis, extent in zip(coordinates, tile, strict=True)]
    return np.lexsort((*coordinates[::-1], *keys[::-1]))


def gilbert_curve(grid: tuple[int, int, int]) -> NDArray[np.int64]:
    """Raster indices along a generalised Hilbert curve, which exists for every box ``[T*H*W]``.

    The box is cut into two, three or five smaller ones whose curves join end to end; equal boxes share one curve, so
    the work grows with the number of distinct shapes and not with the number of cells.

    Source: the recursion of J. Červený's generalised Hilbert ("gilbert") curve.
    """
    axes = sorted(range(3), key=lambda axis: -grid[axis])
    points = _box_curve((grid[axes[0]], grid[axes[1]], grid[axes[2]]), {})
    coordinates = [points[:, axes.index(axis)] for axis in range(3)]
    return np.ravel_multi_index(coordinates, grid).astype(np.int64)


def _box_curve(box: tuple[int, int, int], known: dict[tuple[int, int, int], Points]) -> Points:
    """Cells of a box, from its origin to the far end of its first axis."""
    if box not in known:
        known[box] = _line(box) if sorted(box)[1] == 1 else np.concatenate(_pieces(box, known))
    return known[box]


def _line(box: tuple[int, int, int]) -> Points:
    points = np.zeros((max(box), 3), np.int32)
    points[:, int(np.argmax(box))] = np.arange(max(box))
    return points


def _pieces(box: tuple[int, int, int], known: dict[tuple[int, int, int], Points]) -> list[Points]:
    """Curves of the smaller boxes. A piece is placed by its first cell and the box's axes that it runs along.

    An axis is 1, 2 or 3, negative when the piece runs backwards along it.
    """
    a, b, c = box
    half_a, half_b, half_c = _even_half(a), _even_half(b), _even_half(c)

    def piece(start: tuple[int, int, int], *runs: tuple[int, int]) -> Points:
        inner = _box_curve((runs[0][1], runs[1][1], runs[2][1]), known)
        points = np.empty_like(inner)
        for column, (axis, _) in enumerate(runs):
            points[:, abs(axis) - 1] = start[abs(axis) - 1] + np.sign(axis) * inner[:, column]
        return points

    if 2 * a > 3 * b and 2 * a > 3 * c:  # long: one after the other
        return [
            piece((0, 0, 0), (1, half_a), (2, b), (3, c)),
            piece((half_a, 0, 0), (1, a - half_a), (2, b), (3, c)),
        ]
    if c == 1 or 3 * b > 4 * c:  # flat: up, across, down in the plane of the first two axes
        return [
            piece((0, 0, 0), (2, half_b), (3, c), (1, half_a)),
            piece((0, half_b, 0), (1, a), (2, b - half_b), (3, c)),
            piece((a - 1, half_b - 1, 0), (-2, half_b), (3, c), (-1, a - half_a)),
        ]
    if b == 1 or 3 * c > 4 * b:  # the same in the plane of the first and the third
        return [
            piece((0, 0, 0), (3, half_c), (1, half_a), (2, b)),
            piece((0, 0, half_c), (1, a), (2, b), (3, c - half_c)),
            piece((a - 1, 0, half_c - 1), (-3, half_c), (-1, a - half_a), (2, b)),
        ]
    return [  # compact: five boxes
        piece((0, 0, 0), (2, half_b), (3, half_c), (1, half_a)),
        piece((0, half_b, 0), (3, c), (1, half_a), (2, b - half_b)),
        piece((0, half_b - 1, c - 1), (1, a), (-2, half_b), (-3, c - half_c)),
        piece((a - 1, half_b, c - 1), (-3, c), (-1, a - half_a), (2, b - half_b)),
        piece((a - 1, half_b - 1, 0), (-2, half_b), (3, half_c), (-1, a - half_a)),
    ]


def _even_half(length: int) -> int:
    """Half of a length, rounded up to an even number where that leaves something: the curve then joins smoothly."""
    half = length // 2
    return half + 1 if half % 2 and length > 2 else max(half, 1)
