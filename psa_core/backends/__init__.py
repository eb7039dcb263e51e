"""Backends, and the one that serves a call."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from ..capability import Reason, reason_against
from ..config import PSAConfig
from ..ordering import TokenOrder

BACKENDS = ("auto", "triton", "reference")


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run here; the message says why and what would help.

    Args:
        reason: What that message is made from, as ``code`` and ``values``.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.code = reason.code
        self.values = reason.values


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


def resolve(name: str, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Backend:
    """Return the backend that serves a call, or say why it cannot.

    ``auto`` takes Triton on CUDA, and the reference elsewhere and where the inputs need gradients.

    Args:
        name: One of ``BACKENDS``.
        q: Queries ``[B, H, N, D]``; k and v likewise, where they may need gradients of their own.

    Raises:
        ValueError: the name is not a backend's.
        BackendUnavailable: the backend cannot run on q's device, dtype or with what is installed, or cannot give the
            gradients that the inputs need.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v))
    if name == "auto":
        name = "triton" if q.device.type == "cuda" and not gradients else "reference"
    if reason := reason_against(name, q.device, q.dtype, q.shape[-1], gradients):
        raise BackendUnavailable(reason)
    backend: Backend = import_module(f".{name}", __name__)
    return backend
