"""Launch settings of the attention kernel, by GPU generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttendConfig:
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
        precision: Input precision of fp32 matrix products.
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
    precision: str = "tf32"
    fast: bool = True


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as major * 10 + minor; 80 for the interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def attend_config(sm: int, dtype: torch.dtype, head_dim: int, query_block: int) -> AttendConfig:
    """Settings for a compute capability, dtype, head dim and query block."""
    if dtype == torch.float32:
        return AttendConfig(
            block_m=64, block_n=64, num_warps=8, num_stages=1, exact_n=64, exact_stages=1, precision="ieee", fast=False
        )
    if sm == 90 and head_dim == 128:  # two programs of 128 rows share an SM and take turns on its tensor cores
        return AttendConfig(
            block_m=query_block, block_n=32, num_warps=4, num_stages=3, exact_n=64, exact_stages=2, descriptors=True
        )
    if sm == 90:  # three programs of 128 rows, or four of 64
        return AttendConfig(
            block_m=query_block, block_n=32, num_warps=4, num_stages=3, exact_n=64, exact_stages=3,
            max_registers=168 if query_block == 128 else 128,
        )  # fmt: skip
    if sm == 100:
        return AttendConfig(
            block_m=64, block_n=64, num_warps=8, num_stages=2, exact_n=64, exact_stages=2, fast=False
        )  # Triton 3.6 fails to compile the fast pass's check for overflow there
    if head_dim == 128:  # more rows would spill registers
        return AttendConfig(block_m=64, block_n=64, num_warps=4, num_stages=2, exact_n=64, exact_stages=2)
    return AttendConfig(block_m=query_block, block_n=64, num_warps=8, num_stages=2, exact_n=64, exact_stages=2)
