"""The one node that only the demo needs: its prompts, without an 11 GB text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI, which puts this folder among its custom nodes."""
    from .node import DemoExtension

    return DemoExtension()
