"""Pyramid sparse attention for video models: torch and Triton, usable without ComfyUI."""

from .attention import PSAStats, plan_order, psa_attention
from .config import PSAConfig
from .layout import TokenLayout
from .ordering import TokenOrder

__all__ = ["PSAConfig", "PSAStats", "TokenLayout", "TokenOrder", "plan_order", "psa_attention"]
