"""CogVideoX weights: their shapes, and from the names that diffusers gives them to those of ComfyUI's own class."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..psa_core.models.cogvideox import HEAD_DIM, TABLE_GRID, TEXT_TOKENS

# diffusers' name of a layer: ComfyUI's. Each has a weight and a bias, and is in every CogVideoX.
LAYERS = {
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding.linear_1": "time_embedding_linear_1",
    "time_embedding.linear_2": "time_embedding_linear_2",
    "norm_final": "norm_final",
    "norm_out.linear": "norm_out.linear",
    "norm_out.norm": "norm_out.norm",
    "proj_out": "proj_out",
}

# Only in CogVideoX1.5 image to video.
OFFSET_LAYERS = {
    "ofs_embedding.linear_1": "ofs_embedding_linear_1",
    "ofs_embedding.linear_2": "ofs_embedding_linear_2",
}

# In each transformer block: transformer_blocks.N there, blocks.N here.
BLOCK_LAYERS = {
    "norm1.linear": "norm1.linear",
    "norm1.norm": "norm1.norm",
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.norm_q": "norm_q",
    "attn1.norm_k": "norm_k",
    "attn1.to_out.0": "attn_out",
    "norm2.linear": "norm2.linear",
    "norm2.norm": "norm2.norm",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}

# Only in CogVideoX-5B image to video; the same name in both.
POSITION_TABLE = "patch_embed.pos_embedding"

# Prefixes under which LoRA files keep the layers of the transformer.
LORA_PREFIXES = ("", "transformer.", "base_model.model.", "diffusion_model.")

_PARAMETERS = ("weight", "bias")
_BLOCK = re.compile(r"transformer_blocks\.([0-9]{1,4})\.")
_SHOWN = 4
_SHOWN_CHARACTERS = 100
_PATCH = 2
_OUT_CHANNELS = 16


class WrongTensors(ValueError):
    """Names or shapes of a file's tensors are not what they should be; the message says what they are."""


def layer_names(blocks: int, offset: bool = True) -> dict[str, str]:
    """All layers of a transformer: diffusers' names and ComfyUI's.

    Args:
        blocks: Number of transformer blocks.
        offset: With the layers of CogVideoX1.5 image to video.
    """
    names = dict(LAYERS)
    if offset:
        names |= OFFSET_LAYERS
    for index in range(blocks):
        for theirs, ours in BLOCK_LAYERS.items():
            names[f"transformer_blocks.{index}.{theirs}"] = f"blocks.{index}.{ours}"
    return names


def rename(keys: Collection[str]) -> dict[str, str]:
    """ComfyUI's name for every tensor of a transformer in diffusers' layout.

    Raises:
        WrongTensors: these are not the tensors of one whole CogVideoX transformer.
    """
    if "blocks.0.norm1.linear.weight" in keys:
        raise WrongTensors("is in ComfyUI's own layout already; the node Load Diffusion Model loads it")
    indices = [int(match[1]) for key in keys if (match := _BLOCK.match(key))]
    # A block's number is no reason to make a table of a million names.
    blocks = min(max(indices, default=-1), len(keys)) + 1
    layers = layer_names(blocks, offset=any(key.startswith("ofs_embedding.") for key in keys))
    names = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in layers.items() for part in _PARAMETERS}
    wanted = set(names)
    names[POSITION_TABLE] = POSITION_TABLE
    if unknown := [key for key in keys if key not in names]:
        raise WrongTensors(f"is no CogVideoX transformer in diffusers' layout; it has {quote(unknown)}")
    if missing := sorted(wanted.difference(keys)):
        raise WrongTensors(f"is no whole CogVideoX transformer in diffusers' layout; it lacks {quote(missing)}")
    return {key: names[key] for key in keys}


def check_shapes(shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse tensors that do not belong together, or that ComfyUI's class has no place for.

    Args:
        shapes: Shape of every tensor of a transformer, by diffusers' names.

    Raises:
        WrongTensors: naming the tensor, its shape and what it should be.
    """
    (width,) = _sizes(shapes, "norm_final.weight", "its width")
    time, _ = _sizes(shapes, "time_embedding.linear_1.weight", "time channels, width")
    _, text = _sizes(shapes, "patch_embed.text_proj.weight", "width, text channels")
    if width % HEAD_DIM:
        raise WrongTensors(f"has norm_final.weight of {width} channels, which should be a multiple of {HEAD_DIM}")
    # A convolution; CogVideoX1.5, whose tokens are of two latent frames, has a matrix.
    version_1 = len(shapes["patch_embed.proj.weight"]) == 4
    form = "width, channels, rows, columns" if version_1 else "width, channels of a patch"
    channels = _sizes(shapes, "patch_embed.proj.weight", form)[1]
    patch = _PATCH * _PATCH * (1 if version_1 else _PATCH)
    if not version_1:
        channels = -(-channels // patch) * patch
    wanted: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (width, channels, *(_PATCH, _PATCH) * version_1),
        "patch_embed.text_proj": (width, text),
        "time_embedding.linear_1": (time, width),
        "time_embedding.linear_2": (time, time),
        "norm_final": (width,),
        "norm_out.linear": (2 * width, time),
        "norm_out.norm": (width,),
        "proj_out": (patch * _OUT_CHANNELS, width),
        "norm1.linear": (6 * width, time),
        "norm1.norm": (width,),
        "attn1.norm_q": (HEAD_DIM,),
        "attn1.norm_k": (HEAD_DIM,),
        "norm2.linear": (6 * width, time),
        "norm2.norm": (width,),
        "ff.net.0.proj": (4 * width, width),
        "ff.net.2": (width, 4 * width),
    }
    wanted |= dict.fromkeys(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"), (width, width))
    if "ofs_embedding.linear_1.weight" in shapes:
        offset, _ = _sizes(shapes, "ofs_embedding.linear_1.weight", "offset channels, offset channels")
        wanted |= dict.fromkeys(OFFSET_LAYERS, (offset, offset))
    for key, shape in shapes.items():
        layer, _, part = _BLOCK.sub("", key).rpartition(".")
        if key == POSITION_TABLE:
            right: tuple[int, ...] = (1, TEXT_TOKENS + prod(TABLE_GRID), width)
        else:
            right = wanted[layer] if part == "weight" else wanted[layer][:1]
        if tuple(shape) != right:
            raise WrongTensors(f"has {key} of shape {tuple(shape)}, which should be {right}")


def _sizes(shapes: Mapping[str, Sequence[int]], key: str, form: str) -> tuple[int, ...]:
    shape = tuple(shapes[key])
    if len(shape) != form.count(",") + 1 or 0 in shape:
        raise WrongTensors(f"has {key} of shape {shape}, which should be ({form})")
    return shape


def lora_targets(blocks: int) -> dict[str, str]:
    """What a LoRA file may call a layer, and the name of its weight in ComfyUI's model."""
    layers = layer_names(blocks)
    return {
        f"{prefix}{theirs}": f"diffusion_model.{ours}.weight"
        for prefix in LORA_PREFIXES
        for theirs, ours in layers.items()
    }


def quote(keys: Iterable[str]) -> str:
    """The first of some keys, for a message."""
    keys = list(keys)
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(shortened, keys[:_SHOWN])) + more if keys else "no keys"


def shortened(text: str) -> str:
    """A text out of a file, for a message: left out in the middle where it is long."""
    text = text.encode("utf-8", "backslashreplace").decode()  # half a character cannot be shown
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def sincos_positions(width: int, grid: tuple[int, int, int], text_tokens: int, spatial_scale: float) -> Tensor:
    """Position table of CogVideoX-2B, which diffusers computes and ComfyUI expects among the weights.

    Args:
        width: Channels of a token.
        grid: Tokens of the video along time, height and width.
        text_tokens: Zero rows in front.
        spatial_scale: Divides the spatial coordinates.

    Returns:
        ``[1, text_tokens + prod(grid), width]``: a quarter of the channels for time, then columns, then rows.
    """
    frames, rows, columns = grid
    time = _sincos(torch.arange(frames), width // 4)[:, None, None].expand(*grid, -1)
    spatial = 3 * width // 8
    column = _sincos(torch.arange(columns) / spatial_scale, spatial)[None, None].expand(*grid, -1)
    row = _sincos(torch.arange(rows) / spatial_scale, spatial)[None, :, None].expand(*grid, -1)
    video = torch.cat((time, column, row), dim=-1).flatten(0, 2)
    return torch.cat((video.new_zeros(text_tokens, width), video))[None].float()


def _sincos(positions: Tensor, channels: int) -> Tensor:
    frequencies = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
