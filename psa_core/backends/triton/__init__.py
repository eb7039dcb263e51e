"""Triton kernels for NVIDIA GPUs from sm_80 on (and Triton's interpreter)."""

from .attend import attend
from .grouping import sort_by_content
from .importance import importance
from .pyramid import prepare, prepare_given
from .select import count, select, select_given
from .storage import workspace_bytes_per_head
from .warm_up import warm_up

__all__ = [
    "attend",
    "count",
    "importance",
    "prepare",
    "prepare_given",
    "select",
    "select_given",
    "sort_by_content",
    "warm_up",
    "workspace_bytes_per_head",
]
