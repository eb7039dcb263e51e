"""A CogVideoX model of random weights in a real ComfyUI that has one: small enough to sample in a moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

HEADS = 3  # ComfyUI computes its position table for widths divisible by 3
BLOCKS = 2
TEXT = 26
LATENT = (3, 16, 18)


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
        "time_embed_dim": 64,
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
