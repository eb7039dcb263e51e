"""CogVideoX models of random weights, ComfyUI's and diffusers': small enough to sample in a moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

HEADS = 3  # ComfyUI computes its position table for widths divisible by 3
BLOCKS = 2
TEXT = 26
LATENT = (3, 16, 18)
TIME = 64

# What diffusers makes the released models of.
ROTARY = {"use_rotary_positional_embeddings": True}
VERSION_15 = {**ROTARY, "patch_size_t": 2, "sample_height": 96, "sample_width": 170, "sample_frames": 81}
RELEASED = {
    "2b": {"num_attention_heads": 30, "num_layers": 30},
    "5b": {**ROTARY, "num_attention_heads": 48, "num_layers": 42},
    "5b i2v": {
        **ROTARY,
        "num_attention_heads": 48,
        "num_layers": 42,
        "in_channels": 32,
        "use_learned_positional_embeddings": True,
    },
    "1.5 5b": {**VERSION_15, "num_attention_heads": 48, "num_layers": 42},
    "1.5 5b i2v": {**VERSION_15, "num_attention_heads": 48, "num_layers": 42, "in_channels": 32, "ofs_embed_dim": 512},
}


def network_class() -> type:
    """ComfyUI's own class; skips the test where there is none."""
    return pytest.importorskip(
        "comfy.ldm.cogvideo.model", reason="this ComfyUI has no CogVideoX of its own; COMFYUI_PATH may name a newer one"
    ).CogVideoXTransformer3DModel


def make_network(**changes: Any) -> torch.nn.Module:
    """The network alone, seeded: CogVideoX-5B's layout unless changed."""
    cls = network_class()
    import comfy.ops

    settings = {
        "num_attention_heads": HEADS,
        "num_layers": BLOCKS,
        "time_embed_dim": TIME,
        "use_rotary_positional_embeddings": True,
        "device": "cpu",
        "dtype": torch.float32,
        "operations": comfy.ops.disable_weight_init,
    }
    network = cls(**(settings | changes))
    fill(network)
    return network


def fill(network: torch.nn.Module) -> None:
    """Give a network seeded weights that keep its activations in bounds, whatever their names."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise * weight[0].numel() ** -0.5)
            else:
                weight.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * noise)


def diffusers_model(variant: str) -> Any:
    """A small transformer of diffusers' own class, seeded."""
    from diffusers import CogVideoXTransformer3DModel

    settings = RELEASED[variant] | {"num_attention_heads": HEADS, "num_layers": BLOCKS, "time_embed_dim": TIME}
    if "ofs_embed_dim" in settings:
        settings["ofs_embed_dim"] = TIME
    model = CogVideoXTransformer3DModel(**settings).eval()
    fill(model)
    if settings.get("use_learned_positional_embeddings"):
        noise = torch.randn(model.patch_embed.pos_embedding.shape, generator=torch.Generator().manual_seed(3))
        noise[:, :226] = 0  # ComfyUI gives the text no positions
        model.patch_embed.pos_embedding.copy_(noise)
    return model


def make_model(**changes: Any) -> Any:
    """A ModelPatcher around the network, loaded as ComfyUI loads a checkpoint."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model_state_dict(make_network(**changes).state_dict(), {})
    assert model is not None
    return model


def sample(model: Any, *, latent: tuple[int, int, int] = LATENT, text: int = TEXT, cfg: float = 6.0) -> Tensor:
    """Sample a latent in four steps from a fixed seed, through ComfyUI's own sampling."""
    import comfy.sample

    empty = torch.zeros(1, 16, *latent)
    generator = torch.Generator().manual_seed(1)
    positive, negative = ([[torch.randn(1, text, 4096, generator=generator), {}]] for _ in range(2))
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, 2),
        4,
        cfg,
        "euler",
        "simple",
        positive,
        negative,
        empty,
        disable_pbar=True,
        seed=2,
    )
