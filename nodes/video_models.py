"""The video models of ComfyUI that PSA knows: their family, and where the video is among their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.wan.model import CameraWanModel, HumoWanModel, VaceWanModel, WanModel, WanModel_S2V
from comfy.ldm.wan.model_animate import AnimateWanModel

from ..psa_core import TokenLayout
from ..psa_core.models import cogvideox
from ..psa_core.models.wan import detect_family

try:
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
except ImportError:  # a ComfyUI before its native CogVideoX
    CogVideoXTransformer3DModel = None

# Exact classes, not their subclasses: those add tokens and attention calls of their own.
_KNOWN_CLASSES = (WanModel, CameraWanModel, VaceWanModel, AnimateWanModel, HumoWanModel, WanModel_S2V)

_HUMO_AUDIO_TOKENS = 16
"""Audio tokens that each frame of HuMo looks at."""

_S2V_MOTION_PATCHES = ((1, 1, 2, 2), (2, 2, 4, 4), (16, 4, 8, 8))
"""S2V's earlier motion, from the nearest frames to the farthest: latent frames, and their patch (t, h, w)."""


class UnsupportedModel(Exception):
    """PSA cannot tell what this model is doing; the message says why."""


@dataclass(frozen=True)
class ModelFacts:
    """What a diffusion model is.

    Args:
        preset_family: Name of the preset file made for it.
        note: What the user should know about that choice; empty if nothing.
        blocks: Number of transformer blocks.
    """

    preset_family: str
    note: str
    blocks: int


@dataclass(frozen=True)
class VideoSequence:
    """The token sequence of one call of a model.

    Args:
        layout: Where the video is in it.
        context_lengths: Tokens of the texts and images that its cross attention may look at.
        one_call_per_block: Every block makes exactly one attention call, so that counting them tells the block.
        side_blocks: Blocks that attend to the video right after one of the model's own, by the index of the latter.
    """

    layout: TokenLayout
    context_lengths: frozenset[int]
    one_call_per_block: bool = False
    side_blocks: Mapping[int, int] = field(default_factory=dict)


def identify(model: torch.nn.Module) -> ModelFacts:
    """Tell what a diffusion model is.

    Raises:
        UnsupportedModel: it is of no class that PSA knows.
    """
    # Some nodes put torch.compile's shell around the model that the user connects.
    model = getattr(model, "_orig_mod", model)
    if _is_cogvideox(model):
        return _identify_cogvideox(model)
    _check_class(model)
    family, note = detect_family(model.dim, len(model.blocks), model.out_dim)
    blocks = len(model.blocks)
    if side_blocks := _side_blocks(model):
        numbering = f"its VACE blocks count as blocks {blocks} to {blocks + len(side_blocks) - 1}"
        note = f"{note}\n{numbering}" if note else numbering
    return ModelFacts(family.preset_family, note, blocks + len(side_blocks))


def read_sequence(model: torch.nn.Module, arguments: Mapping[str, Any]) -> VideoSequence:
    """Derive the token sequence from the named arguments of a diffusion model's forward call.

    Raises:
        UnsupportedModel: the model is of no class that PSA knows, or its input is not a video latent.
    """
    if not _is_cogvideox(model):
        _check_class(model)
    if not {"x", "context"} <= arguments.keys():
        raise UnsupportedModel(f"another node has given {type(model).__name__} a forward function that PSA cannot read")
    x = arguments["x"]
    if x.dim() != 5:
        raise UnsupportedModel(f"the latent has shape {tuple(x.shape)}, not [batch, channels, frames, height, width]")
    if _is_cogvideox(model):
        return _read_cogvideox(model, arguments)
    return _read_wan(model, arguments)


def read_sigma(options: Mapping[str, Any]) -> float:
    """Read the noise level of a model call from its ``transformer_options``; waits for the device, once per call.

    Raises:
        UnsupportedModel: the sampler does not say.
    """
    if (sigmas := options.get("sigmas")) is None:
        raise UnsupportedModel("the sampler does not tell the model its noise level")
    return float(sigmas.flatten()[0])


def _is_cogvideox(model: torch.nn.Module) -> bool:
    return type(model) is CogVideoXTransformer3DModel


def _identify_cogvideox(model: torch.nn.Module) -> ModelFacts:
    blocks = len(model.blocks)
    family, note = cogvideox.detect_family(model.num_attention_heads, blocks, model.patch_size_t or 1)
    return ModelFacts(family.preset_family, note, blocks)


def _read_cogvideox(model: torch.nn.Module, arguments: Mapping[str, Any]) -> VideoSequence:
    # Text and video attend together, text first; the model pads the latent to whole patches.
    patch = (model.patch_size_t or 1, model.patch_size, model.patch_size)
    layout = TokenLayout(_token_grid(arguments["x"].shape[2:], patch), video_start=arguments["context"].shape[1])
    return VideoSequence(layout, frozenset(), one_call_per_block=True)


def _read_wan(model: torch.nn.Module, arguments: Mapping[str, Any]) -> VideoSequence:
    grid = _token_grid(arguments["x"].shape[2:], model.patch_size)
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
    after += sum(math.prod(_token_grid(x.shape[-3:], model.patch_size)) for x in appended if x is not None)
    contexts = _context_lengths(arguments)
    if type(model) is HumoWanModel:
        contexts |= {_HUMO_AUDIO_TOKENS}
    layout = TokenLayout(grid, video_start=before, tokens=before + math.prod(grid) + after)
    return VideoSequence(layout, contexts, side_blocks=_side_blocks(model))


def _side_blocks(model: torch.nn.Module) -> dict[int, int]:
    """VACE's blocks work on the control video beside the model's own; they are counted after these."""
    if type(model) is not VaceWanModel:
        return {}
    return {after: len(model.blocks) + index for after, index in model.vace_layers_mapping.items()}


def _check_class(model: torch.nn.Module) -> None:
    if type(model) not in _KNOWN_CLASSES:
        wan = ", ".join(cls.__name__ for cls in _KNOWN_CLASSES)
        known = f"{wan}: Wan 2.1 and 2.2 video; CogVideoXTransformer3DModel: CogVideoX"
        raise UnsupportedModel(f"{type(model).__name__} is not a model that PSA knows ({known})")


def _token_grid(shape: Iterable[int], patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    time, height, width = (math.ceil(extent / patch) for extent, patch in zip(shape, patch_size, strict=True))
    return time, height, width


def _context_lengths(arguments: Mapping[str, Any]) -> frozenset[int]:
    text = arguments["context"].shape[1]
    if (image := arguments.get("clip_fea")) is None:
        return frozenset({text})
    return frozenset({text, image.shape[-2], text + image.shape[-2]})
