"""Backends, what can run here, and why not."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import PSAConfig
from ..ordering import TokenOrder

BACKENDS = ("auto", "triton", "reference")


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run here; the message says why and what would help."""


class Backend(Protocol):
    """Four steps, each of which answers the same in every backend, up to rounding, and what goes with them.

    ``prepared`` and ``selection`` are the backend's own; they are only handed back to it.
    """

    def workspace_bytes_per_head(self, q: Tensor, order: TokenOrder, config: PSAConfig) -> int:
        """Temporary memory of one head of one batch item, in bytes."""

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> Any:
        """Order, centre and pool keys and values, and take the variances."""

    def importance(self, prepared: Any) -> Tensor:
        """Estimated attention mass ``[B, H, query blocks, key blocks]``; rows sum to 1."""

    def select(self, prepared: Any, importance: Tensor) -> Any:
        """Choose a level for every (query block, key block)."""

    def attend(self, prepared: Any, selection: Any, out: Tensor) -> None:
        """Write the attention output into ``out`` ``[B, H, N, D]``, in the order of the inputs."""

    def count(self, prepared: Any, selection: Any) -> tuple[Tensor, Tensor]:
        """Density ``[B, H]`` and number of video pairs at each level ``[B, H, levels]``."""

    def warm_up(self, q: Tensor, k: Tensor, v: Tensor, order: TokenOrder, config: PSAConfig, scale: float) -> None:
        """Have ready what a call needs, which its first one would wait for."""


def resolve(name: str, q: Tensor) -> Backend:
    """Return the backend that serves q, or say why it cannot.

    Raises:
        ValueError: the name is not a backend's.
        BackendUnavailable: the backend cannot run on q's device, dtype or with what is installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "auto":
        name = "triton" if q.device.type == "cuda" else "reference"
    if name == "triton" and (reason := triton_unavailable_reason(q.device, q.dtype)):
        raise BackendUnavailable(reason)
    backend: Backend = import_module(f".{name}", __name__)
    return backend


def triton_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot serve this device and dtype, or None if it can."""
    if find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"Triton is not installed; install the {package} release that fits torch {torch.__version__}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"Triton kernels take bf16, fp16 and fp32, not {dtype}"
    if device.type == "cuda":
        if torch.version.hip:
            return "the Triton kernels are written for NVIDIA GPUs; AMD ones are not supported yet"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the GPU is sm_{major}{minor}; the Triton kernels need sm_80 (Ampere) or newer"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels run on CUDA devices, not on {device.type}"
