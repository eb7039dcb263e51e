"""What a call's kernels are launched with on this GPU: types of products, tile sizes, pipelining."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ordering import TokenOrder


@dataclass(frozen=True)
class AttendTiles:
    """Tile sizes and pipelining of the attention kernel.

    Args:
        block_m: Query rows of a program, a divisor of the query block.
        block_n: Key rows of a tile.
        num_warps: Warps of a program.
        num_stages: Depth of software pipelining.
        exact_n: Key rows of a tile of level 1, a divisor of the key block.
        exact_stages: Depth of software pipelining at level 1.
        descriptors: Fetch level 1 with the GPU's copy engine, where the installed Triton can.
        max_registers: Registers of a thread at most, so that more programs fit on an SM.
        fast: Try a pass without rescaling first. Not where compiling it fails or takes too long: fp32 products are
            unrolled.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    exact_n: int
    exact_stages: int
    descriptors: bool = False
    max_registers: int | None = None
    fast: bool = True


@dataclass(frozen=True)
class Plan:
    """Made once for a call, before its first kernel.

    Args:
        rows_dtype: What the rows of the pyramids are stored in.
        precision: Input precision of products of queries, keys, weights and values, if they are fp32.
        statistics_precision: Input precision of products of variances. All terms are positive, so tf32 keeps three
            digits of the sum.
        importance_rows: Sampled query rows of a program of the importance kernel.
        importance_warps: Its warps.
        attend: Tiles of the attention kernel.
    """

    rows_dtype: torch.dtype
    precision: str
    statistics_precision: str
    importance_rows: int
    importance_warps: int
    attend: AttendTiles

    @staticmethod
    def of(q: Tensor, order: TokenOrder) -> Plan:
        """Plan for queries ``[B, H, N, D]`` and how they are cut into blocks."""
        tiles = _attend_tiles(capability(q.device), q.dtype, q.shape[-1], order.queries.size)
        if q.dtype == torch.float32:
            return Plan(q.dtype, "ieee", "tf32x3", importance_rows=32, importance_warps=8, attend=tiles)
        return Plan(q.dtype, "tf32", "tf32", importance_rows=64, importance_warps=4, attend=tiles)


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as major * 10 + minor; 80 for the interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _attend_tiles(sm: int, dtype: torch.dtype, head_dim: int, query_block: int) -> AttendTiles:
    if dtype == torch.float32:
        return AttendTiles(block_m=64, block_n=64, num_warps=8, num_stages=1, exact_n=64, exact_stages=1, fast=False)
    if sm == 90 and head_dim == 128:  # two programs of 128 rows share an SM and take turns on its tensor cores
        return AttendTiles(
            block_m=query_block, block_n=32, num_warps=4, num_stages=3, exact_n=64, exact_stages=2, descriptors=True
        )
    if sm == 90:  # three programs of 128 rows, or four of 64
        return AttendTiles(
            block_m=query_block, block_n=32, num_warps=4, num_stages=3, exact_n=64, exact_stages=3,
            max_registers=168 if query_block == 128 else 128,
        )  # fmt: skip
    if sm == 100:
        return AttendTiles(
            block_m=64, block_n=64, num_warps=8, num_stages=2, exact_n=64, exact_stages=2, fast=False
        )  # Triton 3.6 fails to compile the fast pass's check for overflow there
    if head_dim == 128:  # more rows would spill registers
        return AttendTiles(block_m=64, block_n=64, num_warps=4, num_stages=2, exact_n=64, exact_stages=2)
    return AttendTiles(block_m=query_block, block_n=64, num_warps=8, num_stages=2, exact_n=64, exact_stages=2)
