"""Wan 2.1 and 2.2 in ComfyUI: text, images, control videos, references and audio beside the video."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy.ldm.wan.model import CameraWanModel, HumoWanModel, VaceWanModel, WanModel, WanModel_S2V
from comfy.ldm.wan.model_animate import AnimateWanModel
from torch import nn

from ...psa_core import TokenLayout
from ...psa_core.models.wan import detect_family
from ..words import Words
from .sequence import Block, BlockOrder, ModelFacts, Stack, VideoSequence, latent_and_context, token_grid

TITLE = "Wan 2.1 and 2.2 video"
KNOWN: tuple[type[nn.Module], ...] = (
    WanModel,
    CameraWanModel,
    VaceWanModel,
    AnimateWanModel,
    HumoWanModel,
    WanModel_S2V,
)
CLASSES: tuple[str, ...] = tuple(cls.__name__ for cls in KNOWN)

_OWN, _VACE = "double", "vace"

_HUMO_AUDIO_TOKENS = 16
"""Audio tokens that each frame of HuMo looks at."""

_S2V_MOTION_PATCHES = ((1, 1, 2, 2), (2, 2, 4, 4), (16, 4, 8, 8))
"""S2V's earlier motion, from the nearest frames to the farthest: latent frames, and their patch (t, h, w)."""


def facts(model: Any) -> ModelFacts:
    """The family by the model's size, with a note where that is not the only answer."""
    order = blocks(model)
    own, *side = order.stacks
    found = detect_family(model.dim, own.size, model.out_dim)
    notes = []
    if not found.is_released:
        notes.append(Words.of("unreleased_wan", width=model.dim, blocks=own.size, nearest=found.family.title))
    elif found.others:
        notes.append(Words.of("same_architecture", others=tuple(family.title for family in found.others)))
    if side:
        notes.append(Words.of("vace_blocks", first=own.size, last=len(order) - 1))
    return ModelFacts(found.family.preset_family, tuple(notes), order)


def blocks(model: Any) -> BlockOrder:
    """The model's own blocks, and after them those of VACE, which work on the control video."""
    own = Stack(_OWN, len(model.blocks), replace_key="double_block")
    if type(model) is not VaceWanModel:
        return BlockOrder((own,))
    return BlockOrder((own, Stack(_VACE, len(model.vace_layers_mapping))))


def sequence(model: Any, arguments: Mapping[str, Any]) -> VideoSequence:
    """References before the video, joined frames, context latents and S2V's motion after it; text apart."""
    x, context = latent_and_context(model, arguments)
    grid = token_grid(x.shape[2:], model.patch_size)
    appended = [*(arguments.get("context_latents") or ()), arguments.get("time_dim_concat")]
    before = after = 0
    if (reference := arguments.get("reference_latent")) is not None:
        if type(model) in (HumoWanModel, WanModel_S2V):
            appended.append(reference)
        elif model.ref_conv is not None:
            _, height, width = model.patch_size
            before = (reference.shape[-2] // height) * (reference.shape[-1] // width)
    if type(model) is WanModel_S2V and (motion := arguments.get("reference_motion")) is not None:
        height, width = motion.shape[-2:]
        after = sum(frames // t * (height // h) * (width // w) for frames, t, h, w in _S2V_MOTION_PATCHES)
    after += sum(math.prod(token_grid(x.shape[-3:], model.patch_size)) for x in appended if x is not None)
    contexts = {context.shape[1]}
    if (image := arguments.get("clip_fea")) is not None:
        contexts |= {image.shape[-2], context.shape[1] + image.shape[-2]}
    if type(model) is HumoWanModel:
        contexts |= {_HUMO_AUDIO_TOKENS}
    return VideoSequence(
        TokenLayout(grid, video_start=before, tokens=before + math.prod(grid) + after),
        frozenset(contexts),
        blocks(model),
        side_blocks=_side_blocks(model),
    )


def _side_blocks(model: Any) -> dict[Block, Block]:
    if type(model) is not VaceWanModel:
        return {}
    return {Block(_OWN, after): Block(_VACE, index) for after, index in model.vace_layers_mapping.items()}
