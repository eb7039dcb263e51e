"""PSA for ComfyUI: pyramid sparse attention for video models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import PSAExtension

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> PSAExtension:
    """Give ComfyUI the extension; what it needs is imported only now, so that the pack can be imported without it."""
    from .nodes import PSAExtension

    return PSAExtension()
