"""CogVideoX in ComfyUI: text and video attend together, the text first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...psa_core import TokenLayout
from ...psa_core.models.cogvideox import COGVIDEOX_2B, COGVIDEOX_5B, detect_family
from ..words import Words
from .sequence import BlockOrder, ModelFacts, Stack, VideoSequence, latent_and_context, token_grid

TITLE = "CogVideoX"
CLASSES: tuple[str, ...] = ("CogVideoXTransformer3DModel",)
KNOWN: tuple[type[nn.Module], ...] = ()
try:
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
except ImportError:
    pass  # a ComfyUI before its native CogVideoX
else:
    KNOWN = (CogVideoXTransformer3DModel,)


def facts(model: Any) -> ModelFacts:
    """The family by the model's size and patch, with a note where its presets were made for another size."""
    order = blocks(model)
    found = detect_family(model.num_attention_heads, len(order), model.patch_size_t or 1)
    notes = []
    if not found.is_released:
        notes.append(
            Words.of(
                "unreleased_cogvideox",
                heads=model.num_attention_heads,
                blocks=len(order),
                nearest=found.family.title,
            )
        )
    elif found.family is COGVIDEOX_2B:
        notes.append(Words.of("borrowed_presets", model=COGVIDEOX_2B.title, other=COGVIDEOX_5B.title))
    return ModelFacts(found.family.preset_family, tuple(notes), order)


def blocks(model: Any) -> BlockOrder:
    """One stack, which ComfyUI neither names nor replaces."""
    return BlockOrder((Stack("block", len(model.blocks)),))


def sequence(model: Any, arguments: Mapping[str, Any]) -> VideoSequence:
    """The text, then the video, whose latent the model pads to whole patches."""
    x, context = latent_and_context(model, arguments)
    patch = (model.patch_size_t or 1, model.patch_size, model.patch_size)
    layout = TokenLayout(token_grid(x.shape[2:], patch), video_start=context.shape[1])
    return VideoSequence(layout, frozenset(), blocks(model), one_call_per_block=True)
