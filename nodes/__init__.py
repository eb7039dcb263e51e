"""The nodes: all that knows ComfyUI, nothing that knows Triton."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention_patch import PSAAttentionPatch
from .compare import PSACompare
from .load_cogvideox import PSALoadCogVideoX, PSALoadCogVideoXLoRA
from .preset import PSAPreset
from .preset_loader import PSAPresetLoader
from .quality_probe import PSAQualityProbe
from .report import PSAReport


class PSAExtension(ComfyExtension):
    """The pack, as ComfyUI asks for it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            PSAAttentionPatch,
            PSAPresetLoader,
            PSAPreset,
            PSAReport,
            PSAQualityProbe,
            PSACompare,
            PSALoadCogVideoX,
            PSALoadCogVideoXLoRA,
        ]
