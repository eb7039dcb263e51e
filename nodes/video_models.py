"""The video models of ComfyUI that PSA knows: their family, and where the video is among their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.wan.model import CameraWanModel, WanModel

from ..psa_core import TokenLayout
from ..psa_core.models import cogvideox
from ..psa_core.models.wan import detect_family

try:
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
except ImportError:  # a ComfyUI before its native CogVideoX
    CogVideoXTransformer3DModel = None

# Exact classes, not their subclasses: those add tokens and attention calls of their own.
_KNOWN_CLASSES = (WanModel, CameraWanModel)


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
    """

    layout: TokenLayout
    context_lengths: frozenset[int]
    one_call_per_block: bool = False


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
    return ModelFacts(family.preset_family, note, len(model.blocks))


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
    grid = _token_grid(x.shape[2:], model.patch_size)
    before = 0
    reference = arguments.get("reference_latent")
    if model.ref_conv is not None and reference is not None:
        _, height, width = model.patch_size
        before = (reference.shape[-2] // height) * (reference.shape[-1] // width)
    appended = list(arguments.get("context_latents") or ())
    if (frames := arguments.get("time_dim_concat")) is not None:
        appended.append(frames)
    after = sum(math.prod(_token_grid(latent.shape[-3:], model.patch_size)) for latent in appended)
    layout = TokenLayout(grid, video_start=before, tokens=before + math.prod(grid) + after)
    return VideoSequence(layout, _context_lengths(arguments))


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
